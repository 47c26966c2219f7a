"""Logs and progress."""
