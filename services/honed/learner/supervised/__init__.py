"""Training on texts and judgements, before a run goes online."""
