"""Sampling from the live policy and swapping its weights while it serves."""
