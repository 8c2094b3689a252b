"""What is done to a sliced checkpoint: the cut healed in closed form."""
