"""Having a container that runs already in front of one: its streams are the node's, or containerd's.

Those of containers that the node has started are copied to one client more. Those of others, which a kubelet or crictl made, come over
CRI's own Attach, whose every client gets a copy as well.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from nixlet import errors
from nixlet.containerd import client as containerd_client
from nixlet.containerd import cri
from nixlet.containers import clients, endings, keeping, pipes

#: Seconds until the runtime is taken to listen to a container whose output it was asked for: it answers before it does, and what
#: the container writes in between is lost to us. A person's first key comes later anyway.
_SETTLING = 0.1


class Attacher:
    """Attaches clients to the containers of one node."""

    def __init__(
        self, runtime: cri.RuntimeClient, containerd: containerd_client.Containerd, keeper: keeping.Keeper
    ) -> None:
        """For one node.

        Args:
            runtime: The CRI.
            containerd: The containerd behind it.
            keeper: Has the streams of the node's own containers.
        """
        self._runtime = runtime
        self._containerd = containerd
        self._keeper = keeper

    async def find(self, container: str) -> "Attachment":
        """A container that runs.

        Raises:
            NotFoundError: There is no such container.
        """
        _, texts = await self._runtime.container_details(container)
        config = cri.container_config(texts)
        tty, interactive = bool(config.get("tty")), bool(config.get("stdin"))
        return Attachment(self._runtime, self._containerd, self._keeper, container, tty=tty, interactive=interactive)


class Attachment:
    """A container that can be had in front of one.

    Attributes:
        container: Its ID.
        tty: It has a terminal.
        interactive: It takes input.
    """

    def __init__(
        self,
        runtime: cri.RuntimeClient,
        containerd: containerd_client.Containerd,
        keeper: keeping.Keeper,
        container: str,
        *,
        tty: bool,
        interactive: bool,
    ) -> None:
        self._runtime = runtime
        self._containerd = containerd
        self._keeper = keeper
        self.container = container
        self.tty = tty
        self.interactive = interactive

    async def serve(self, client: clients.Client) -> int:
        """Give a client its output from now on, and it the client's input, until the container has ended; its exit status.

        Args:
            client: The client; who has it finishes it.
        """
        own = await self._keeper.awaited(self.container)
        if own is not None:
            own.join(client)
            code = await asyncio.shield(own.ended)
            # Who is told of the end may remove it at once.
            await endings.wait_until_said(self._runtime, self.container)
            return code
        await self._show(client)
        return (await endings.wait(self._runtime, self._containerd, self.container, patient=True)).exit_code

    async def _show(self, client: clients.Client) -> None:
        url = await self._runtime.attach(self.container, stdin=self.interactive, output=True, tty=self.tty)
        # Most nodes have no use for it, and its WebSockets take long to import.
        from nixlet.containerd import streaming  # noqa: PLC0415 (see above)

        async with streaming.attached(url) as output:
            feeding = asyncio.create_task(self._feed(client), name="input")
            try:
                async for piece in output.output():
                    await client.give(piece.stream, piece.data)
            finally:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)

    async def _feed(self, client: clients.Client) -> None:
        """Hand the input on, over a connection of its own: only the end of the connection can say that it has ended."""
        if not self.interactive or not client.has_input:
            return
        await asyncio.sleep(_SETTLING)
        with contextlib.suppress(errors.NixletError):
            url = await self._runtime.attach(self.container, stdin=True, output=False, tty=self.tty)
            from nixlet.containerd import streaming  # noqa: PLC0415 (see _show)

            async with streaming.attached(url) as attached, _piped(client) as reader:
                while data := await pipes.read(reader):
                    if not await attached.send(data):
                        return
                await attached.close()


@contextlib.asynccontextmanager
async def _piped(client: clients.Client) -> AsyncIterator[int]:
    """A pipe that gives a client's input."""
    with contextlib.ExitStack() as stack:
        reader, writer = pipes.new_pipe()
        stack.callback(os.close, reader)
        writing = stack.enter_context(contextlib.ExitStack())
        writing.callback(os.close, writer)

        async def feed() -> None:
            await client.feed(writer)
            writing.close()

        feeding = asyncio.create_task(feed(), name="input")
        try:
            yield reader
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
