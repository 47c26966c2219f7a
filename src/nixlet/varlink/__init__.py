"""Varlink (https://varlink.org): JSON messages on a unix socket, with descriptors beside them; the wire, a server, a blocking client."""
