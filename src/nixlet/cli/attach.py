"""``nixlet attach``: a container that runs already gets our terminal, input and signals."""

from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nixlet.cli.node import Node


#: Seconds until the runtime is taken to listen to a container whose output it was asked for: it answers before it does, and what
#: the container writes in between is lost to us. A person's first key comes later anyway.
_SETTLING = 0.1


@grammar.verb(
    options.STATE_DIR,
    grammar.Argument("container", completes="containers"),
)
@options.asynchronous
async def attach(container: str, state_dir: str) -> int:
    """Hand our terminal, input and signals to a running CONTAINER until it ends; its exit status is ours.

    What it has written by now is for nixlet logs. Ctrl-P Ctrl-Q leaves the container alone, as does the end of our terminal.
    """
    import asyncio

    from nixlet import errors
    from nixlet.cli import containers, node, terminal
    from nixlet.containerd import streaming
    from nixlet.rpc.gen import cri_pb2

    async with node.connected(state_dir) as connection:
        found = await containers.find(connection, container)
        if found.state != cri_pb2.CONTAINER_RUNNING:
            raise errors.FailedPreconditionError(f"container {container} is not running")
        _, info = await containers.details(connection, found.id)
        config = info.get("config", {})
        stdin, tty = bool(config.get("stdin")), bool(config.get("tty"))
        if tty:
            terminal.check(stdin=stdin)
        signals = terminal.Signals(connection.tasks, found.id)
        url = await connection.runtime.attach(found.id, stdin=stdin, output=True, tty=tty)
        left = asyncio.Event()
        async with streaming.attached(url) as output:

            async def show() -> int:
                async for piece in output.output():
                    await terminal.written(piece.stream, piece.data)
                return await connection.wait(found.id)

            ours: set[asyncio.Task[object]] = {asyncio.create_task(left.wait(), name="detach")}
            if stdin:
                ours.add(asyncio.create_task(_feed(connection, found.id, left.set, tty=tty), name="stdin"))
            showing = asyncio.create_task(show(), name="output")
            try:
                with terminal.given_to(signals.resize, signals.deliver, tty=tty, stdin=stdin, hung_up=left.set):
                    while not (showing.done() or left.is_set()):
                        await asyncio.wait({showing, *ours}, return_when=asyncio.FIRST_COMPLETED)
                        ours = {task for task in ours if not task.done()}
            finally:
                for task in (showing, *ours):
                    task.cancel()
                await asyncio.gather(showing, *ours, return_exceptions=True)
    return 0 if left.is_set() else signals.exit_code(showing.result())


async def _feed(connection: "Node", container: str, detach: "Callable[[], None]", *, tty: bool) -> None:
    """Hand our input on, over a connection of its own: only the end of the connection can say that it has ended."""
    import asyncio

    from nixlet.cli import terminal
    from nixlet.containerd import streaming

    await asyncio.sleep(_SETTLING)
    url = await connection.runtime.attach(container, stdin=True, output=False, tty=tty)
    async with streaming.attached(url) as attachment:
        async for data in terminal.until_detached(terminal.Input(), detach) if tty else terminal.Input():
            if not await attachment.send(data):
                return
        await attachment.close()
