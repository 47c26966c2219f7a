"""containerd's leases: what is made, found or used under one is kept from its garbage collector.

A lease of ours has no end by the clock, which may jump: it lasts as long as the work under it. It says which process holds it, so that
those of processes that died are found and deleted by whoever comes next.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping

from nixlet import errors
from nixlet.host import procfs, uncut
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import containerd_leases_grpc, containerd_leases_pb2

#: The label that names the process for which a lease is held (``procfs.mark_of``).
_HOLDER = "io.nixlet.holder"

#: Seconds for containerd to delete a lease: whoever held it has something else to tell, and the next one deletes it as well.
_DELETE_TIMEOUT = 5.0


class Leases:
    """The leases that this process has in one of a containerd's namespaces.

    Args:
        channel: The way to containerd.
        peer: What errors call it.
        metadata: What goes with each call: the namespace.
    """

    def __init__(self, channel: channels.Channel, peer: str, metadata: Mapping[str, str]) -> None:
        self._peer = peer
        self._metadata = metadata
        self._stub = containerd_leases_grpc.LeasesStub(channel)
        #: Those that couldn't be deleted when they should have been.
        self._overdue: set[str] = set()

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[str]:
        """A new lease for the time of the context, by its name."""
        await self._tidy_up()
        name = f"nixlet-{os.urandom(8).hex()}"
        is_made = False
        try:
            with channels.translated(self._peer):
                labels = {_HOLDER: procfs.mark_of(os.getpid())}
                request = containerd_leases_pb2.CreateRequest(id=name, labels=labels)
                await self._stub.Create(request, metadata=self._metadata)
            is_made = True
            yield name
        finally:
            # It must not hide why the work under it failed, nor outlive a caller that was cancelled.
            self._overdue.add(name)
            with contextlib.suppress(errors.NixletError):
                await uncut.to_its_end(self._delete(name))
            if not is_made:
                # Nobody waited for an answer, and it may only now come to be.
                self._overdue.add(name)

    async def add(self, lease: str, kind: str, resource: str) -> None:
        """Have a lease keep what may be there already, without a look whether it is.

        Args:
            lease: Its name.
            kind: "snapshots/NAME" for a snapshotter's snapshots.
            resource: What containerd calls it.
        """
        request = containerd_leases_pb2.AddResourceRequest(
            id=lease, resource=containerd_leases_pb2.Resource(id=resource, type=kind)
        )
        with channels.translated(self._peer):
            await self._stub.AddResource(request, metadata=self._metadata)

    async def _delete(self, name: str) -> None:
        with contextlib.suppress(errors.NotFoundError), channels.translated(self._peer):
            request = containerd_leases_pb2.DeleteRequest(id=name)
            async with asyncio.timeout(_DELETE_TIMEOUT):
                await self._stub.Delete(request, metadata=self._metadata)
        self._overdue.discard(name)

    async def _tidy_up(self) -> None:
        """Delete leases of processes that have ended, and those of our own that should be gone."""
        # Each time: a process may die at any time, and what it held would stay for as long as nobody looks.
        with channels.translated(self._peer):
            request = containerd_leases_pb2.ListRequest(filters=[f'labels."{_HOLDER}"'])
            leases = (await self._stub.List(request, metadata=self._metadata)).leases
        self._overdue |= {lease.id for lease in leases if procfs.is_gone(lease.labels[_HOLDER])}
        # What can't be deleted now is none of the next lease's business.
        await asyncio.gather(*(self._delete(name) for name in self._overdue), return_exceptions=True)
