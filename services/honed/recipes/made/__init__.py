"""Data that the package makes for its recipes: one file each, named in a run file as `data: {made: NAME}`."""
