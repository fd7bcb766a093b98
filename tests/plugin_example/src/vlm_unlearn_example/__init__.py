"""Plug-ins for vlm-unlearn, one of each kind."""
