"""Attacks on what a model has learned to refuse."""
