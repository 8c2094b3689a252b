"""One file a command: the stages of each in order."""
