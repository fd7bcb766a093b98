"""Generates the responses of a model to prompts, with several backends."""
