"""Rates, differences and agreement, each with a 95 % interval."""
