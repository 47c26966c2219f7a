"""The network of a node's pods: the part of the cluster's that the node was given, and flannel, which brings packets to other nodes."""
