"""Offline work on data sets: import, convert, check, audit, diversify, select."""
