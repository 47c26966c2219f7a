"""Runtime handlers: the runtimes that pods name by their RuntimeClass, and the snapshotters that these want images in."""

from nixlet.containerd import cri
from nixlet.rpc.gen import cri_pb2


class Handlers:
    """The runtimes of one containerd.

    Args:
        runtime: Its CRI.
        own: The snapshotter that is meant where no runtime is named.
    """

    def __init__(self, runtime: cri.RuntimeClient, own: str) -> None:
        self._runtime = runtime
        self._own = own

    async def elsewhere(self, image: cri_pb2.ImageSpec, sandbox: cri_pb2.PodSandboxConfig | None = None) -> str:
        """The snapshotter of the runtime that a request names, where it is another than our own; else an empty string.

        A runtime that containerd doesn't know, or that has no snapshotter of its own, is no reason for another.

        Args:
            image: The request's image.
            sandbox: The pod that it is for, where the request says that.

        Raises:
            NixletError: containerd doesn't answer.
        """
        handler = image.runtime_handler or (
            sandbox.annotations.get(cri.RUNTIME_ANNOTATION, "") if sandbox is not None else ""
        )
        named = await self._runtime.runtime_snapshotter(handler) if handler else ""
        return named if named != self._own else ""
