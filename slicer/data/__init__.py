"""Text in, token sequences out: calibration batches and training corpora."""
