"""A small client of Kubernetes API servers, and of the health of a cluster's programs."""
