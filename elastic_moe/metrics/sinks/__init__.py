"""Copies of a run's metrics for other systems, one file per system."""
