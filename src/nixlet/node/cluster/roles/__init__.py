"""The roles that a node has in a cluster: server, agent, guest, and a kubelet without one. Each prepares its start, and goes on with it."""
