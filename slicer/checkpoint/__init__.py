"""Checkpoints on disk: reading, cutting, writing and checking them."""
