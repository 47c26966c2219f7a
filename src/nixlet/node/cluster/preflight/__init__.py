"""What is found out before a cluster's programs start: where they are and their versions, what the cluster is made with, its settings, ports, the kernel."""
