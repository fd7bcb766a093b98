"""Judges: each turns a prompt and a response into a Verdict with one of four labels, or none when it fails."""
