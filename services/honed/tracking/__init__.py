"""Experiment tracking: what a run measures, sent to MLflow, Weights & Biases or TensorBoard. Off unless the run file asks."""
