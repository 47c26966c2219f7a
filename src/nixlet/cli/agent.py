"""``nixlet agent``: run a node that is told what to do from elsewhere."""

from typing import Any

from nixlet.cli import grammar, server


@grammar.verb(
    *server.OPTIONS,
)
def agent(**given: Any) -> None:  # noqa: ANN401 (what the options give)
    """Run a node of a cluster whose server is elsewhere: it joins it by --server and --token. Without --server it is alone.

    It takes server's options and reads the same configuration files.
    """
    server.run(given, agent=True)
