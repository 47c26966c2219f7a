"""The images that a node brings itself, or has before anybody asks for them."""
