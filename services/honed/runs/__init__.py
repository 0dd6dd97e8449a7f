"""Runs after the fact: which there are on this machine, and what sets them apart. Read from their directories alone."""
