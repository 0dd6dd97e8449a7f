"""honed keeps a language model sharp on live feedback while it serves."""

__version__ = "0.1.0"
