"""What is a node's own on its machine: claimed, written down, and known again when the node is taken away."""
