"""OCI images: references, archives, building, loading."""
