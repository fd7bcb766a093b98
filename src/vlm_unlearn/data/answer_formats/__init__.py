"""Answer files of other programs. Each module is a format of the same name."""
