"""Recipes over seeds, measured: what is run, what has been, and the table and page of it."""
