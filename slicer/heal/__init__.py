"""Closing the cut: weight compensation in closed form, and training."""
