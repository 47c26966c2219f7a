"""Pods through the CRI, without a kubelet: played once, watched, removed, and what an earlier node left of them."""
