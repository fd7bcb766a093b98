"""Wrappers that add a term or a step to any method."""
