"""The room that a cluster's state needs on the disk, and what there is to say where there is none.

etcd ends when it can't write, and loses nothing that it has acknowledged. kine goes on, and refuses changes and deletions; but what is to be created
it acknowledges and doesn't keep (seen with 0.17.5: the error of its insertion gives way to that of a look-up, which finds nothing and has none). Both
go on when there is room. An etcd whose database has reached its quota refuses as well, and is relieved of that here: nobody else would.
"""

import asyncio
import logging
import os

from nixlet import errors
from nixlet.cluster import settings as model
from nixlet.cluster.kubeconfigs import Credentials
from nixlet.cluster.layout import Layout
from nixlet.host import files
from nixlet.kubeclient import asynchronous, etcd
from nixlet.kubeclient.endpoint import Endpoint

#: How Go says that a disk, or somebody's part of it, is full (ENOSPC, EDQUOT); and sqlite.
_FULL = ("no space left on device", "disk quota exceeded", "database or disk is full")

#: Seconds between two looks at etcd's alarms, at first and at most: each look that finds one again puts off the next for longer, since the
#: whole database is written anew each time.
_LOOK, _LONGEST = 15.0, 60.0

_log = logging.getLogger("nixlet.cluster")


def cause(directory: str, output: str) -> str:
    """Why a datastore's program has ended, as far as it is the disk's doing; empty: it isn't.

    Args:
        directory: Where it writes.
        output: The end of what it printed.
    """
    if not any(words in output for words in _FULL) and not (os.path.isdir(directory) and files.is_full(directory)):
        return ""
    return f"the file system of {directory} is full, and the cluster takes no changes until there is room"


def check_room(layout: Layout) -> None:
    """Check that what a cluster's state is on isn't full, where a node has that.

    Raises:
        ResourceExhaustedError: It is.
    """
    if os.path.isdir(layout.database):
        files.check_room(layout.database)


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
