"""Measures a model by a suite: generate, judge, score, with files between."""
