"""``nixlet server``: run a node."""

import sys
from typing import TYPE_CHECKING, Any

from nixlet.cli import grammar, options, settings

if TYPE_CHECKING:
    from nixlet.node.settings import configfile

#: The options of a verb that runs a node.
OPTIONS = (
    *settings.OPTIONS,
    grammar.Flag("--show-config", text="Print the settings and where each comes from, and start nothing."),
    options.OUTPUT,
)


@grammar.verb(
    *OPTIONS,
)
def server(**given: Any) -> None:  # noqa: ANN401 (what the options give)
    """Run a node: containerd with a snapshotter, and the CRI image service; with Kubernetes' programs a whole cluster of one node.

    A setting is taken from its flag, else from its environment variable, else from the configuration files, else it has its
    default; --show-config says which. SIGTERM and SIGINT take the node down; pods go on, and the next start takes them up again.
    """
    run(given)


def run(given: dict[str, Any], *, agent: bool = False) -> None:
    """Run a node until it is told to stop, or show what it would be.

    Args:
        given: What ``OPTIONS`` gave the verb.
        agent: It is no server: it joins a cluster, or it is alone.

    Raises:
        UnsupportedError: A server is to join another one.
    """
    configuration = settings.load(given)
    joining = next((name for name in ("server", "kubeconfig") if getattr(configuration.settings, name)), "")
    if joining and not agent:
        from nixlet import errors

        place = configuration.origins[joining].called(joining)
        raise errors.UnsupportedError(
            f"{place}: a cluster has one server, which joins no other one", hint="nixlet agent joins a cluster"
        )
    if given["show_config"]:
        for warning in configuration.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        _show(configuration, given["output"])
        return
    chosen = configuration.settings
    if chosen.rootless:
        from nixlet.node.lifecycle import namespaces

        namespaces.become_inside(chosen, configuration.files)
    import asyncio
    import dataclasses
    import logging

    import uvloop

    from nixlet.node.lifecycle import server as node
    from nixlet.telemetry import logs

    logs.configure(debug=configuration.settings.debug, path=configuration.settings.log)
    for warning in configuration.warnings:
        logging.getLogger("nixlet.node").warning("%s", warning)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        alone = agent and not joining
        runner.run(node.run(dataclasses.replace(chosen, kubernetes="no") if alone else chosen))


def _show(configuration: "configfile.Configuration", output: str) -> None:
    from nixlet.cli import table
    from nixlet.node.settings import names

    said = [
        (names.key(name), settings.shown(name, configuration.settings), origin)
        for name, origin in configuration.origins.items()
    ]
    if output == "json":
        listed = {
            key: {"value": value, "source": origin.source, "places": list(origin.places)} for key, value, origin in said
        }
        options.print_json({"files": list(configuration.files), "settings": listed})
        return
    rows = [
        (names.key(name), settings.what_holds(name, configuration.settings), str(origin))
        for name, origin in configuration.origins.items()
    ]
    table.echo(("SETTING", "VALUE", "FROM"), rows)
