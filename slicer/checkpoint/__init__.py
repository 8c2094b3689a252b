"""What a checkpoint is, on disk: read it, cut it, write it, check it."""
