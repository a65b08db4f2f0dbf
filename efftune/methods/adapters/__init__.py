"""Adapters: a small trained part beside frozen weights."""
