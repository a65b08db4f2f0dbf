"""What recipes cost and what their gradients are worth, measured on the user's own model and data."""
