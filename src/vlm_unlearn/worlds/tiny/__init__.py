"""A small artificial world in the published file formats, for the demo and the tests."""
