"""Files of judgements, for clients: reading and writing them needs the contract's messages and nothing else."""
