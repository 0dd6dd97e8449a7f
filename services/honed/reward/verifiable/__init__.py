"""Rewards that follow from a response alone, by rules: answers, numbers, patterns, schemas, tests. No model has a say."""
