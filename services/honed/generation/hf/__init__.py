"""The engine on transformers, for machines without vLLM."""
