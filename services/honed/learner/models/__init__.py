"""Models as the learner reads them: action tokens in, numbers out."""
