"""``nixlet agent``: run a node that is told what to do from elsewhere."""

from typing import Any

from nixlet.cli import grammar, server


@grammar.verb(
    *server.OPTIONS,
)
def agent(**given: Any) -> None:  # noqa: ANN401 (what the options give)
    """Run a node without what only a server has: it is alone, since joining a cluster is not supported yet.

    It takes server's options and reads the same configuration files.
    """
    server.run(given, alone=True)
