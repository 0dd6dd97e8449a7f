"""Looks at everything that a run needs before anything starts: files, model, machine, services. Starts and writes nothing."""
