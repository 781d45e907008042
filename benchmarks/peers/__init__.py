"""What others offer for the same operations, each at its best settings."""
