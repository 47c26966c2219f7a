"""Loading images into a containerd that is not the node's, or into another of its namespaces: done here, by whoever may."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine, Sequence
from typing import Any

from nixlet.cli import link, progressbars, streams
from nixlet.containerd import imagestore, namespaces
from nixlet.host import waits
from nixlet.images import archive as archives
from nixlet.images import importing, loader
from nixlet.node.settings import config
from nixlet.rpc import channel as channels
from nixlet.store import policy, realiser
from nixlet.store.daemon import client as nix


def load(
    fd: int,
    label: str,
    paths: Sequence[str],
    state_dir: str,
    address: str | None,
    namespace: str | None,
    snapshotter: str | None,
    ref: str | None,
    names: list[str],
) -> None:
    """Load the images of an archive; their names go to ``names`` as soon as they are.

    Raises:
        NixletError: It can't be read or loaded.
    """
    store = nix.DaemonStore(nix.DaemonSettings.from_environment(os.environ))
    socket = (address or config.Layout("", state_dir).containerd_socket).removeprefix("unix://")
    if snapshotter is None:
        snapshotter = "nix" if address else _snapshotter_of(state_dir)
    # What another containerd calls the snapshotter that shows store paths is its own affair; a node's is called nix.
    shows_store_paths = address is not None or snapshotter == "nix"
    bringer = realiser.Realiser(store, policy.Policy()) if shows_store_paths else None
    # Before there is an event loop: a pipe may have to be waited for, and Ctrl-C has to end that.
    with archives.open_archive(fd, label=label, piped=True) as source:
        found = importing.Wanted(paths, ref, store.store_dir).read(source)
        loading = _load(source, found, label, socket, namespace or namespaces.CRI, snapshotter, bringer, names)
        asyncio.run(_unless_terminated(loading))


async def _unless_terminated(work: Coroutine[Any, Any, None]) -> None:
    """Do something until SIGTERM comes, which ends it in order, as Ctrl-C does.

    Raises:
        Exit: It came.
    """
    terminated = asyncio.Event()
    # Not where it is ignored, as by somebody who shall not be ended.
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    try:
        await waits.unless(terminated, work)
    except waits.Interrupted:
        raise streams.Exit(128 + signal.SIGTERM) from None


def _snapshotter_of(state_dir: str) -> str:
    with link.connected(state_dir) as node:
        return str(node.call("GetStatus")["snapshotter"])


async def _load(
    source: archives.Archive,
    found: Sequence[importing.Named],
    label: str,
    socket: str,
    namespace: str,
    snapshotter: str,
    bringer: realiser.Realiser | None,
    names: list[str],
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        channel = await stack.enter_async_context(channels.connect(socket))
        loads = loader.Loader(imagestore.ImageStore(channel, socket, namespace), snapshotter, bringer)
        with progressbars.shown(os.path.basename(label)) as sink:
            async for name in importing.load(loads, source, found, None, sink):
                names.append(name)  # noqa: PERF401 (at once: the next one may fail)
