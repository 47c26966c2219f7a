"""What a server has beside the programs of its control plane: room for its state, what its API server must know, manifests, names of nodes."""
