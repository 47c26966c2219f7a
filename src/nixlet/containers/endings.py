"""How containers and pods end, and how one learns of it."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from nixlet import errors
from nixlet.containerd import client, cri
from nixlet.host import iptables
from nixlet.rpc.gen import cri_pb2

#: Seconds until the next try, when the runtime fails: it may be starting again.
RETRY = 0.5

#: Seconds between two looks at a container that is about to have ended: the first, and the longest.
_FIRST_LOOK = 0.005
_LONGEST_LOOK = 0.2

#: How often stopping a container or pod is tried, and seconds between the tries.
_STOP_TRIES = 5
_STOP_INTERVAL = 0.1


async def wait(
    runtime: cri.RuntimeClient,
    containerd: client.Containerd,
    container: str,
    *,
    patient: bool = False,
    look: float = _FIRST_LOOK,
) -> cri_pb2.ContainerStatus:
    """Wait until a container has ended and CRI knows it; its status.

    Args:
        runtime: The CRI.
        containerd: The containerd behind it.
        container: The container.
        patient: Outlast a runtime that is away.
        look: Seconds after which CRI is asked again, at first: each time keeps it from its work.

    Raises:
        NotFoundError: There is no such container (any more).
        NixletError: The runtime fails, and ``patient`` is not set.
    """

    async def ended() -> cri_pb2.ContainerStatus:
        # The task's end is known at once; CRI's own word, which comes when all output is in the log, is a little later.
        with contextlib.suppress(errors.NotFoundError):
            await containerd.wait_task(container)
        return await _said(runtime, container, look)

    return await (_patiently(ended) if patient else ended())


async def wait_until_said(runtime: cri.RuntimeClient, container: str) -> None:
    """Wait until CRI says it, too, of a container whose process has ended, or has no such container any more.

    Until then others see it running, and may not remove it. Outlasts a runtime that is away.
    """
    with contextlib.suppress(errors.NotFoundError):
        await _patiently(lambda: _said(runtime, container))


async def _said(runtime: cri.RuntimeClient, container: str, pause: float = _FIRST_LOOK) -> cri_pb2.ContainerStatus:
    while True:
        status = await runtime.container_status(container)
        if status.state == cri_pb2.CONTAINER_EXITED:
            return status
        await asyncio.sleep(pause)
        pause = min(pause * 1.2, _LONGEST_LOOK)


async def _patiently(step: Callable[[], Awaitable[cri_pb2.ContainerStatus]]) -> cri_pb2.ContainerStatus:
    """Take a step that the runtime may be away for, until it is taken."""
    while True:
        try:
            return await step()
        except errors.NotFoundError:
            raise
        except errors.NixletError:
            await asyncio.sleep(RETRY)


async def stop_container(runtime: cri.RuntimeClient, container: str, seconds: int) -> None:
    """End a container.

    Args:
        runtime: The CRI.
        container: The container.
        seconds: Time for it to end by itself; 0: it is killed at once.

    Raises:
        NotFoundError: There is none.
        NixletError: The runtime can't.
    """
    await _tried(lambda: runtime.stop_container(container, seconds))


async def remove_container(runtime: cri.RuntimeClient, container: str) -> None:
    """Remove a container, and end it before if it runs; as ``stop_container``."""
    await _tried(lambda: runtime.remove_container(container))


async def stop_sandbox(runtime: cri.RuntimeClient, sandbox: str) -> None:
    """End a pod's containers and give its network back.

    A pod that somebody else removed meanwhile is no error, though some versions say so. No rule of its network stays in the packet
    filter: a plugin that once failed to take the network down finds no interface the next time, and passes the rules over without a
    word. Whether one failed before isn't known: a node may have been killed since.
    """
    with contextlib.suppress(errors.NotFoundError):
        await _tried(lambda: runtime.stop_sandbox(sandbox))
    await iptables.remove_rules(container=sandbox)


async def remove_sandbox(runtime: cri.RuntimeClient, sandbox: str) -> None:
    """End a sandbox with its containers and remove it, if it is (still) there, with its rules as in ``stop_sandbox``."""
    with contextlib.suppress(errors.NotFoundError):
        try:
            # It ends it as well. To end it before would take its network down twice.
            await runtime.remove_sandbox(sandbox)
        except errors.NotFoundError:
            raise
        except errors.NixletError:
            # A container may have ended by itself at the same moment; and containerd 1.6 and 1.7 don't end what has lost its process.
            await stop_sandbox(runtime, sandbox)
            await runtime.remove_sandbox(sandbox)
    await iptables.remove_rules(container=sandbox)


async def _tried(step: Callable[[], Awaitable[None]]) -> None:
    """Take a step that ends containers, up to some times.

    containerd fails at it when one ends by itself at the same moment; the next try finds it ended.
    """
    for tries_left in reversed(range(_STOP_TRIES)):
        try:
            await step()
        except errors.NotFoundError:
            raise
        except errors.NixletError:
            if not tries_left:
                raise
            await asyncio.sleep(_STOP_INTERVAL)
        else:
            return
