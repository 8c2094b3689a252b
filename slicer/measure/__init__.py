"""Measures what the layers do: calibration text, distances in the residual stream, losses without parts of the
model."""
