"""Leases of a containerd that doesn't answer any more."""

import asyncio
import types
from typing import Any

import pytest
from grpclib import exceptions
from grpclib.const import Status

from nixlet import errors
from nixlet.containerd import leases
from nixlet.rpc.gen import containerd_leases_grpc, containerd_leases_pb2


class Silent:
    """containerd's service, which is silent when a lease is to be deleted.

    Attributes:
        silent: It is.
        late: Leases come to be when this is set, whoever has gone by then.
        leases: Those that it has.
        asked: The names that were to be deleted.
    """

    def __init__(self) -> None:
        self.silent = True
        self.late: asyncio.Event | None = None
        self.making: list[asyncio.Task[None]] = []
        self.leases: dict[str, Any] = {}
        self.asked: list[str] = []

    async def Create(self, request: Any, **_: Any) -> None:  # noqa: N802 (containerd's name)
        self.making.append(asyncio.create_task(self._make(request)))
        await asyncio.shield(self.making[-1])

    async def _make(self, request: Any) -> None:
        if self.late is not None:
            await self.late.wait()
        self.leases[request.id] = containerd_leases_pb2.Lease(id=request.id, labels=request.labels)

    async def List(self, *_: Any, **__: Any) -> Any:  # noqa: N802
        return types.SimpleNamespace(leases=list(self.leases.values()))

    async def Delete(self, request: Any, **_: Any) -> None:  # noqa: N802
        self.asked.append(request.id)
        if self.silent:
            await asyncio.Event().wait()
        if self.leases.pop(request.id, None) is None:
            raise exceptions.GRPCError(Status.NOT_FOUND)


@pytest.fixture
def containerd(monkeypatch: pytest.MonkeyPatch) -> tuple[Silent, leases.Leases]:
    """It, and our leases there."""
    monkeypatch.setattr(leases, "_DELETE_TIMEOUT", 0.05)
    service = Silent()
    monkeypatch.setattr(containerd_leases_grpc, "LeasesStub", lambda _: service)
    return service, leases.Leases(None, "containerd", {})  # type: ignore[arg-type]  # only the stub has a use for it


async def test_a_lease_that_cant_be_deleted_hides_nothing_and_is_deleted_by_the_next(
    containerd: tuple[Silent, leases.Leases],
) -> None:
    service, ours = containerd

    async def fail() -> None:
        async with ours.held():
            raise errors.NotFoundError("what there was to tell")

    with pytest.raises(errors.NotFoundError, match="what there was to tell"):
        await asyncio.wait_for(fail(), 30)
    (name,) = service.leases
    # It is silent still, which is none of the next one's business.
    async with ours.held() as other:
        assert service.asked == [name] * 2
        service.silent = False
    assert service.asked == [name, name, other]
    async with ours.held():
        assert name not in service.leases
    assert service.leases == {}


async def test_a_cancel_ends_for_a_silent_containerd(containerd: tuple[Silent, leases.Leases]) -> None:
    service, ours = containerd

    async def hold() -> None:
        async with ours.held():
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    while not service.leases:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=30)
    assert task.cancelled()
    assert len(service.asked) == 1


async def test_a_lease_that_comes_to_be_after_its_holder_has_gone_is_deleted_by_the_next(
    containerd: tuple[Silent, leases.Leases],
) -> None:
    service, ours = containerd
    service.silent, service.late = False, asyncio.Event()

    async def hold() -> None:
        async with ours.held():
            pytest.fail("it is not made yet")

    task = asyncio.create_task(hold())
    while not service.making:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=30)
    assert task.cancelled()
    service.late.set()
    await asyncio.gather(*service.making)
    assert len(service.leases) == 1
    for _ in range(2):
        async with ours.held() as name:
            assert list(service.leases) == [name]
    # Once it is known to be gone nobody asks for it any more.
    assert len(service.asked) == 4
