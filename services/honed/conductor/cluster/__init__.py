"""The conductor on Kubernetes: jobs run as Jobs, and one conductor at a time holds the Lease."""
