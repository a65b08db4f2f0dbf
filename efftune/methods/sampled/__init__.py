"""Backward that keeps or computes less."""
