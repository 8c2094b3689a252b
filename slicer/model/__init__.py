"""A checkpoint loaded in torch: layers, walks, pruned models, verification."""
