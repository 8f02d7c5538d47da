"""What a network saw: one pass watched, heat maps made of it, and measures of how far they can be believed."""
