"""Models in torch: their sublayers, the maps that write to the residual stream, and the pruned model."""
