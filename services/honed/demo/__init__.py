"""The default run on human ratings: what `honed demo` measures before and after, and how it reports it."""
