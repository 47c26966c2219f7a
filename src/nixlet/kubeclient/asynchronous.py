"""The client for the event loop: each request in a thread, and a caller that is cancelled ends it by closing its socket."""

import asyncio
import concurrent.futures
import contextlib
import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

from nixlet import errors
from nixlet.cluster.kubeconfigs import Kubeconfig
from nixlet.host import uncut
from nixlet.kubeclient.calls import Call
from nixlet.kubeclient.client import Client, Event
from nixlet.kubeclient.endpoint import Endpoint
from nixlet.kubeclient.resources import Resource

P = ParamSpec("P")
T = TypeVar("T")

#: How many requests go on at once, and how many watches beside them; more wait. Threads are made as they are needed.
_MAX_REQUESTS, _MAX_WATCHES = 32, 256


class _Lane:
    """Threads for requests of one kind. Who waits for one waits on the loop, where waiting can be given up."""

    def __init__(self, most: int, name: str) -> None:
        self._free = asyncio.Semaphore(most)
        self._threads = concurrent.futures.ThreadPoolExecutor(most, thread_name_prefix=name)

    async def run(self, work: Callable[[Call], T], call: Call, seconds: float | None = None) -> T:
        """Do it in a thread; a caller that is cancelled goes on when that has ended.

        Raises:
            TimeoutError: There was none within these seconds.
            CallCancelledError: It was given up meanwhile.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with asyncio.timeout(seconds):
            await self._free.acquire()
        try:
            call.begin(loop.time() - begun)
            return await uncut.outcome(loop.run_in_executor(self._threads, work, call), call.cancel)
        finally:
            self._free.release()

    def close(self) -> None:
        """Wait for those that are at work."""
        self._threads.shutdown()


def _asked(
    method: Callable[Concatenate[Client, P], T],
) -> "Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]":
    """A method of the client's, for the event loop; it takes a ``call`` by itself."""
    asking = cast("Callable[..., T]", method)

    @functools.wraps(method)
    async def asked(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(lambda call: asking(self.client, *args, call=call, **kwargs))

    return asked


class AsyncClient:
    """A ``Client`` whose methods don't hold up the loop. An async context manager, whose end gives up what still goes on.

    What the methods mean and raise is told there. A caller that is cancelled goes on when its thread has ended, which is at once: only the
    look-up of a host's name can't be given up. The time in which a request waits for its turn is of its own time.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._requests = _Lane(_MAX_REQUESTS, "kubernetes")
        # (a watch stands for minutes: no request waits for that)
        self._watches = _Lane(_MAX_WATCHES, "kubernetes-watch")
        self._calls: set[Call] = set()

    @classmethod
    def of_kubeconfig(cls, config: Kubeconfig) -> Self:
        """A client of the API server that a kubeconfig names, as whom that says."""
        return cls(Client(Endpoint.of_kubeconfig(config)))

    async def __aenter__(self) -> Self:
        """Use it."""
        return self

    async def __aexit__(self, *_: object) -> None:
        for call in tuple(self._calls):
            call.cancel()
        # (in another thread, since whoever is at work there may look a name up)
        for lane in (self._requests, self._watches):
            await uncut.to_its_end(asyncio.to_thread(lane.close))
        self.client.close()

    async def _run(self, work: Callable[[Call], T]) -> T:
        with self._known(Call()) as call:
            seconds = self.client.seconds
            try:
                return await self._requests.run(work, call, seconds)
            except TimeoutError as error:
                raise errors.DeadlineExceededError(
                    f"{self.client.endpoint.shown} can't be asked within {seconds:g} s: {_MAX_REQUESTS} requests go on"
                ) from error

    @contextlib.contextmanager
    def _known(self, call: Call) -> Iterator[Call]:
        """Have a call be given up with the client's end."""
        self._calls.add(call)
        try:
            yield call
        finally:
            self._calls.discard(call)

    get = _asked(Client.get)
    list = _asked(Client.list)
    create = _asked(Client.create)
    delete = _asked(Client.delete)
    patch = _asked(Client.patch)
    apply = _asked(Client.apply)
    check = _asked(Client.check)
    raw = _asked(Client.raw)

    async def watch(
        self, resource: Resource, *, version: str, namespace: str = "", labels: str = "", fields: str = ""
    ) -> AsyncGenerator[Event, None]:
        """As ``Client.watch``. Whoever leaves it early closes it (``contextlib.aclosing``)."""
        call = Call()
        events = self.client.watch(
            resource, version=version, namespace=namespace, labels=labels, fields=fields, call=call
        )
        try:
            while (event := await self._next(events, call)) is not None:
                yield event
        finally:
            # Nobody is in it: whoever was has been waited for.
            events.close()

    async def _next(self, events: Iterator[Event], call: Call) -> Event | None:
        with self._known(call):
            return await self._watches.run(lambda _: next(events, None), call)


async def in_thread(ask: Callable[[Call], T]) -> T:
    """What somebody says who is asked in a thread without a client. A caller that is cancelled gives the question up, and its thread has ended then."""
    call = Call()
    return await uncut.outcome(asyncio.ensure_future(asyncio.to_thread(ask, call)), call.cancel)
