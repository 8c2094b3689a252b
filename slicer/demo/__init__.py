"""The embedded model, its training and the demonstration of the command line."""
