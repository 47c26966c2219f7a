"""The faces of the node: gRPC services that translate between the wire and the rooms below. Adapters only."""
