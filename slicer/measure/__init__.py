"""What the layers do: distances, other metrics, Shapley values."""
