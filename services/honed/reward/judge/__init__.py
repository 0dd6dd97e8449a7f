"""A language model behind an OpenAI-compatible API as the judge of responses."""
