"""What slicer claims about speed and memory, measured against a rival in the same run."""
