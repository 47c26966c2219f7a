"""Manifests that a server applies to its cluster: files of a directory, at start and when they change."""
