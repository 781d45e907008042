"""Training: configuration, the loop, and what keeps a run's state."""
