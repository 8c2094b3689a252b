"""Healing of a cut: weight compensation in closed form, and training."""
