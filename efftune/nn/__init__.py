"""The rest of a block that costs memory in training."""
