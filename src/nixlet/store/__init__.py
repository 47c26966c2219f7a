"""Nix stores: store paths, closures, realising, GC roots, policy."""
