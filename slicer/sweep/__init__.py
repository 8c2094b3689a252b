"""Many cuts of one model, measured and compared."""
