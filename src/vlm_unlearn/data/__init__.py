"""Reads and validates the data of training and evaluation, and encodes it as model inputs."""
