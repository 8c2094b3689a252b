"""The model types that slicer can slice, and how their configs are rewritten."""
