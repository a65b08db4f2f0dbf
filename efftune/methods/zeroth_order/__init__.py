"""Zeroth order: gradients from forward passes alone."""
