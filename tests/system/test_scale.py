"""Sixteen clients at once on a store with many snapshots: no error, nobody locked out, every snapshot listed once."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet.rpc.gen import containerd_snapshots_grpc
from nixlet.rpc.gen import containerd_snapshots_pb2 as pb
from support import alone

pytestmark = pytest.mark.slow

CLIENTS = 16


@pytest.fixture
def place(tmp_path: Path) -> Iterator[alone.Alone]:
    with alone.cleaned_up(3, tmp_path) as made:
        yield made


async def fill(stub: containerd_snapshots_grpc.SnapshotsStub, client: int, count: int) -> None:
    for number in range(count):
        await stub.Prepare(pb.PrepareSnapshotRequest(key=f"there-{client}-{number}", labels={"client": str(client)}))


async def work(place: alone.Alone, client: int, rounds: int) -> None:
    """The life of some snapshots, over a connection of its own, with a look at all of them now and then."""
    async with place.client() as stub:
        for turn in range(rounds):
            active, name = f"active-{client}-{turn}", f"layer-{client}-{turn}"
            await stub.Prepare(pb.PrepareSnapshotRequest(key=active))
            await stub.Commit(pb.CommitSnapshotRequest(key=active, name=name))
            await stub.View(pb.ViewSnapshotRequest(key=active, parent=name))
            assert (await stub.Stat(pb.StatSnapshotRequest(key=active))).info.parent == name
            if turn % 5 == client % 5:
                filters = [f"labels.client=={client}"]
                pages = await stub.List(pb.ListSnapshotsRequest(filters=filters))
                assert all(len(page.info) <= 100 for page in pages)
                assert {info.labels["client"] for page in pages for info in page.info} <= {str(client)}
            await stub.Remove(pb.RemoveSnapshotRequest(key=active))
            if turn % 2:
                await stub.Remove(pb.RemoveSnapshotRequest(key=name))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [1_000, 10_000])
async def test_sixteen_clients(count: int, place: alone.Alone) -> None:
    with place.serving() as process:
        async with place.client() as stub:
            await asyncio.gather(*(fill(stub, client, count // CLIENTS) for client in range(CLIENTS)))
        await asyncio.gather(*(work(place, client, 10) for client in range(CLIENTS)))
        async with place.client() as stub:
            names = [info.name for page in await stub.List(pb.ListSnapshotsRequest()) for info in page.info]
        there = {f"there-{client}-{number}" for client in range(CLIENTS) for number in range(count // CLIENTS)}
        kept = {f"layer-{client}-{turn}" for client in range(CLIENTS) for turn in range(0, 10, 2)}
        assert sorted(names) == sorted(there | kept)
        (line,) = [each for each in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmRSS" in each]
        assert int(line.split()[1]) < 100_000
