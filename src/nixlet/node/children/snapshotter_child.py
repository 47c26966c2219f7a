"""A snapshotter that is a program of its own, as a child of the node."""

import asyncio
from collections.abc import Mapping

from nixlet.host import supervisor, unixsocket
from nixlet.node.requirements import plugins
from nixlet.node.settings import config as node_config

#: Seconds that it gets to serve, and those between two looks whether it does.
_READY_TIMEOUT = 30.0
_LOOK_AGAIN = 0.02


def program(plugin: plugins.Plugin, layout: node_config.Layout, env: Mapping[str, str]) -> supervisor.Program:
    """The node's child that serves a snapshotter; containerd, which waits for it, lives on without it.

    Args:
        plugin: The snapshotter.
        layout: Where things are.
        env: Its whole environment.
    """
    address = plugin.proxy.address

    async def ready() -> None:
        while not unixsocket.is_served(address):
            await asyncio.sleep(_LOOK_AGAIN)

    return supervisor.Program(
        name=plugin.daemon,
        argv=[plugin.daemon, *plugin.arguments],
        env=env,
        log_path=layout.snapshotter_log(plugin.proxy.name),
        ready=ready,
        ready_timeout=_READY_TIMEOUT,
        goes_on_at=address if plugin.goes_on else "",
    )
