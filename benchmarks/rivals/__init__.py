"""slicer against other tools, in the same run; scripts of the repository, not installed."""
