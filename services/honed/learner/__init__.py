"""Learning from scored rollouts, and the training jobs that come before."""
