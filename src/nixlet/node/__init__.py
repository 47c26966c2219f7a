"""The composition root: configuration, start order, supervision of children, checks before the start."""
