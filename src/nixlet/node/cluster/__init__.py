"""A node that is a Kubernetes cluster, or will be one's: its programs found, prepared, started and wired; its pods' network."""
