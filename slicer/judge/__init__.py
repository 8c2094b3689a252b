"""What the figures say: plots."""
