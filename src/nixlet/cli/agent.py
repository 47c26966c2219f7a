"""``nixlet agent``: run a node that is told what to do from elsewhere."""

from typing import Any

from nixlet.cli import grammar, server


@grammar.verb(
    *server.OPTIONS,
)
def agent(**given: Any) -> None:  # noqa: ANN401 (what the options give)
    """Run a node without what only a server has; for now there is nothing of that, and the two are the same.

    It takes server's options and reads the same configuration files. Joining a cluster is not supported yet.
    """
    server.run(given)
