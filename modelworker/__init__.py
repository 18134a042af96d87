"""The stateless worker that computes over pages which the daemon owns."""
