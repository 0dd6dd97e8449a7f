"""Generated stubs of the public contract (protos/honed/v1). Never edited: scripts/protos.py writes them."""
