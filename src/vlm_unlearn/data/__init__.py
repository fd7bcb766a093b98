"""Reads and validates datasets, and encodes them as model inputs."""
