"""Schedules: what trains, and when."""
