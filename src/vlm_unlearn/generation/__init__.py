"""Asks a model the prompts of a suite and keeps every answer."""
