"""Reads other people's data, checks it, and turns it into model inputs."""
