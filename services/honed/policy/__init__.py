"""What a policy version is: its name, its manifest, its store."""
