"""The room that a cluster's state needs on the disk, and what there is to say where there is none.

etcd ends when it can't write, and loses nothing that it has acknowledged. kine goes on, and refuses changes and deletions; but what is to be created
it acknowledges and doesn't keep (seen with 0.17.5: the error of its insertion gives way to that of a look-up, which finds nothing and has none). So kine is ended here
before its disk is full, and isn't started while it nearly is. Both go on when there is room. An etcd whose database has reached its quota refuses as well, and is relieved of that here: nobody else would.
"""

import asyncio
import contextlib
import logging
import os
import signal

from nixlet import errors
from nixlet.cluster import settings as model
from nixlet.cluster.kubeconfigs import Credentials
from nixlet.cluster.layout import Layout
from nixlet.host import files, keptchild
from nixlet.kubeclient import asynchronous, etcd
from nixlet.kubeclient.endpoint import Endpoint

#: How Go says that a disk, or somebody's part of it, is full (ENOSPC, EDQUOT); and sqlite.
_FULL = ("no space left on device", "disk quota exceeded", "database or disk is full")

#: Seconds between two looks at etcd's alarms, at first and at most: each look that finds one again puts off the next for longer, since the
#: whole database is written anew each time.
_LOOK, _LONGEST = 15.0, 60.0

#: The room that kine needs (bytes), which is more than a cluster writes from one look at it to the next; and seconds between those.
_KINE_ROOM = 32 << 20
_KINE_LOOK = 0.5

_log = logging.getLogger("nixlet.cluster")


def cause(directory: str, output: str, *, kine: bool = False) -> str:
    """Why a datastore's program has ended, as far as it is the disk's doing; empty: it isn't.

    Args:
        directory: Where it writes.
        output: The end of what it printed.
        kine: Whether it is kine.
    """
    full = any(words in output for words in _FULL)
    if os.path.isdir(directory):
        full = full or files.is_full(directory) or (kine and files.room(directory) < _KINE_ROOM)
    if not full:
        return ""
    return f"the file system of {directory} is full, and the cluster takes no changes until there is room"


def check_room(layout: Layout) -> None:
    """Check that what a cluster's state is on isn't full, where a node has that.

    Raises:
        ResourceExhaustedError: It is.
    """
    if os.path.isdir(layout.database):
        files.check_room(layout.database)


def check_room_for_kine(directory: str) -> None:
    """Check that kine has room where it writes.

    Raises:
        ResourceExhaustedError: It hasn't.
    """
    if os.path.isdir(directory) and (room := files.room(directory)) < _KINE_ROOM:
        raise errors.ResourceExhaustedError(
            f"the file system of {directory} has {room >> 20} MiB left, and kine is not started with less than {_KINE_ROOM >> 20}: on a full one"
            " it acknowledges what it does not keep",
            hint="make room on that file system",
        )


async def end_without_room(directory: str, child: keptchild.Child) -> None:
    """End kine whenever it has no room where it writes, for ever; whoever keeps it running starts it again when there is."""
    while True:
        await asyncio.sleep(_KINE_LOOK)
        # (a disk that hangs holds up nobody else)
        if child.pid and await asyncio.to_thread(files.room, directory) < _KINE_ROOM:
            # Killed: what sqlite has committed is there, and nothing else was acknowledged.
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)


def etcd_of(cluster: model.ClusterSettings) -> Endpoint:
    """A server's own etcd, as its client."""
    places = cluster.layout
    return Endpoint.of(
        f"https://127.0.0.1:{model.ETCD_CLIENT_PORT}",
        what="etcd",
        authority=places.tls("etcd/server-ca.nochain.crt"),
        credentials=Credentials(places.tls("etcd/client.crt"), places.tls("etcd/client.key")),
    )


class Relief:
    """Relieves an etcd whose database has reached its quota."""

    def __init__(self, endpoint: Endpoint) -> None:
        """What relieves it.

        Args:
            endpoint: The etcd, as its client.
        """
        self._endpoint = endpoint
        self._pause = _LOOK
        self._problem = ""

    def remark(self) -> str:
        """What is wrong with the database; empty: nothing is."""
        return self._problem

    async def keep(self) -> None:
        """Do so whenever it is due, for ever."""
        while True:
            await self.look()
            await asyncio.sleep(self._pause)

    async def look(self) -> None:
        """Look for an alarm, and relieve etcd where there is one; what can't be done is told."""
        try:
            raised = await asynchronous.in_thread(lambda call: etcd.full(self._endpoint, call))
        except (errors.UnavailableError, errors.DeadlineExceededError):
            # It isn't up, which is told elsewhere.
            return
        except errors.NixletError as error:
            self._problem = f"whether etcd's database has room isn't known: {error.message}"
            return
        except Exception:  # noqa: BLE001 (it is told, and the next look may go well)
            _log.exception("etcd's alarms can't be looked at because of a mistake in nixlet")
            return
        if not raised:
            self._pause, self._problem = _LOOK, ""
            return
        self._pause = min(2 * self._pause, _LONGEST)
        try:
            sizes = await asynchronous.in_thread(lambda call: etcd.relieve(self._endpoint, raised, call))
        except errors.NixletError as error:
            # (whatever the cause: that it is full is known by now)
            self._tell(
                f"etcd's database has reached its quota, and can't be made smaller; the cluster takes no changes but deletions: {error.message}"
            )
            return
        before, after = (f"{size / (1 << 20):.0f} MiB" for size in sizes)
        self._tell(
            f"etcd's database had reached its quota, and was made smaller, from {before} to {after}; where it stays so large the cluster takes"
            " no changes but deletions: delete what isn't needed, or give it more: --etcd-arg quota-backend-bytes=BYTES"
        )

    def _tell(self, problem: str) -> None:
        self._problem = problem
        _log.warning("%s", problem)
