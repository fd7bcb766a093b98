"""Attacks on the refusals that a model has learned."""
