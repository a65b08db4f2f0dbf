"""Sampled: backward on a part of the batch, forward on all of it."""
