"""containerd from outside: its API, CRI, its configuration."""
