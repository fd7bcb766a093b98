"""Formats of checkpoints that ``vlm-unlearn convert`` reads. Each is a module that registers a `CheckpointFormat`."""
