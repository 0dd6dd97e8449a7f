"""What `honed.Client` and the command line are made of. Needs grpcio and protobuf, nothing else."""
