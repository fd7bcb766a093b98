"""Turns verdicts into rates with intervals."""
