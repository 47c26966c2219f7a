"""Where and by what name a node is asked. The command line reads this module: it imports nothing."""

#: The node's interface (``org.nixlet.Node.varlink``).
INTERFACE = "org.nixlet.Node"

#: Its socket in the node's state directory.
SOCKET = "node.sock"
