"""Which model families serve, found by serving a tiny random model of each."""
