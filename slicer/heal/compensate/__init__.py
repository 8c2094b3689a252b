"""Weight compensation in closed form."""
