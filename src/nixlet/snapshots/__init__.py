"""The snapshotter: its model, its metadata, views of closures, mounts."""
