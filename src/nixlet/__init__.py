"""nixlet: a container node for Nix users."""

__version__ = "0.1.0"
