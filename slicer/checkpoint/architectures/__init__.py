"""What slicer must know of each model type."""
