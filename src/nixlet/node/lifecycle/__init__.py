"""How a node, or a snapshotter alone, starts, runs, ends and is taken away."""
