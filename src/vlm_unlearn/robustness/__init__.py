"""Attacks on a model: whether the harmful knowledge is gone or only hidden."""
