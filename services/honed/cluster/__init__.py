"""What the command line knows of a run on Kubernetes: its API, its Pods, a way to them, its Secrets. Needs no torch."""
