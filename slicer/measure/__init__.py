"""What the layers do: calibration data, and statistics of the residual stream over it."""
