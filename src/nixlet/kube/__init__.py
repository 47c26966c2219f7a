"""Kubernetes manifests, and what they mean in CRI."""
