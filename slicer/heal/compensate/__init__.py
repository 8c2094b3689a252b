"""Weight compensation in closed form: solve weights or replacements so that the pruned model follows the source."""
