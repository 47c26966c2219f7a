"""What answers on a node's sockets, put together from the services."""
