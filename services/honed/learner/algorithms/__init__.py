"""What can be learned: one algorithm a file."""
