"""What a response is worth: scorers, their weighted sum, and the scoring worker."""
