"""Formats of files that people write, read with the place of each value."""
