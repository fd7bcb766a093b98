"""Readers and writers of the supported data formats."""
