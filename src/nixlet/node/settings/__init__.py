"""What a node is told: settings and their rules, the files that they come from, and where a node keeps things."""
