"""Calibration text, and metrics of layers: distances in the residual stream, losses without parts of the model."""
