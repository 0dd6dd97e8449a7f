"""Load on the endpoints, and what each promise of speed costs beside its limit; every benchmark ends with one JSON object."""
