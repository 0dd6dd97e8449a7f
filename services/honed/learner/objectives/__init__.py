"""Pure functions of tensors: the losses. No I/O, no clock, no settings."""
