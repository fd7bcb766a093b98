"""Readers of other people's files, one module a format. Each gives Examples to train on and Prompts to evaluate with."""
