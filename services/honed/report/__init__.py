"""What a run changed: figures, curves and samples, as JSON for programs and as a page for people."""
