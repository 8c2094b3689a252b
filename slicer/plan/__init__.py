"""What to drop: amounts as people write them, the blocks that can go, the choice, and the Plan that records it."""
