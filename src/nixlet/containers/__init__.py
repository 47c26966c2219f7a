"""Containers: their model, streams, further processes, users and logs; nothing of pods or manifests."""
