"""Conversion of checkpoints in foreign formats to model folders of Hugging Face. Each format is a module."""
