"""What to drop: amounts as users write them, ranked blocks, the choice, and the Plan that records it."""
