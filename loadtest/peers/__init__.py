"""honed beside the trainers that people know, on one machine, model and task: `python -m loadtest.peers`."""
