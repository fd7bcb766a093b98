"""Judges. A judge grades a response with one of four labels, a score, or neither if it fails."""
