"""Runs a recipe: the one Trainer subclass, its batches, and where reference values come from."""
