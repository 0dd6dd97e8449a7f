"""The schema's history, run by the service when it starts."""
