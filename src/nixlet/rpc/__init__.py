"""gRPC over unix sockets: channels, servers, the mapping of errors, the generated stubs."""
