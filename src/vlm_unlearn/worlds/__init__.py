"""Artificial worlds, whose facts are known completely, with their models, judges and demos."""
