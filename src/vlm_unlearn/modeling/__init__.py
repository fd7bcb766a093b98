"""Loads and saves vision-language models and knows the module layout of each model family."""
