"""Quantised storage of frozen weights."""
