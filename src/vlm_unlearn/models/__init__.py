"""Loads vision-language models, knows where each family keeps its parts, and saves them."""
