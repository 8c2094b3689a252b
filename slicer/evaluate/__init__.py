"""What is left of the model: task scores, loss on text, generated samples."""
