"""What every service stands on: server, lifecycle, health, auth, errors, metrics, logging, tracing."""
