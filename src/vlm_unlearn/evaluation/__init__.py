"""Evaluation of a model by a suite in three steps with files between them: generate, judge, score."""
