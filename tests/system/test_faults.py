"""The snapshotter is killed at each of its fault points: the next one finishes or undoes what was cut off."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import containerd_snapshots_grpc
from nixlet.rpc.gen import containerd_snapshots_pb2 as pb
from nixlet.snapshots import faults
from support import alone, storeimages


@pytest.fixture
def place(tmp_path: Path) -> Iterator[alone.Alone]:
    with alone.cleaned_up(3, tmp_path) as made:
        yield made


async def live(stub: containerd_snapshots_grpc.SnapshotsStub, labels: dict[str, str], acknowledged: set[str]) -> None:
    """The life of a Nix layer and a container, from unpacking to cleaning up; notes what was acknowledged."""
    with channels.translated("the snapshotter"):
        await stub.Prepare(pb.PrepareSnapshotRequest(key="ns/1/extract-1", labels=labels))

        await stub.Commit(pb.CommitSnapshotRequest(key="ns/1/extract-1", name="layer", labels=labels))
        acknowledged.add("layer")
        await stub.Prepare(pb.PrepareSnapshotRequest(key="container", parent="layer"))
        acknowledged.add("container")
        for key in ("container", "layer"):
            acknowledged.discard(key)
            await stub.Remove(pb.RemoveSnapshotRequest(key=key))
        await stub.Cleanup(pb.CleanupRequest())


def is_quick(step: str) -> bool:
    """One step of each kind is part of every run: before, inside and after a change."""
    return step in {"closure-realised", "directory-renamed", "view-built", "removal-recorded"}


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=() if is_quick(step) else pytest.mark.slow) for step in faults.STEPS]
)
async def test_a_kill_at_a_step(step: str, place: alone.Alone, store_images: dict[int, storeimages.StoreImage]) -> None:
    labels = {alone.REF: "layer", alone.LAYER: "true"}
    labels |= {f"{alone.PATH}{number}": str(path) for number, path in enumerate(store_images[50].paths)}
    strategy = ("--strategy", "bind" if step == "skeleton-built" else "view")
    # For bind mounts the snapshotter asks its containerd whether it can make them.
    containerd = place.containerd("2.4.2") if step == "skeleton-built" else contextlib.nullcontext()
    with containerd:
        await kill_at(step, place, strategy, labels)


async def kill_at(step: str, place: alone.Alone, strategy: tuple[str, str], labels: dict[str, str]) -> None:
    acknowledged: set[str] = set()
    with place.serving(*strategy, environment={"NIXLET_FAULT_POINT": step}) as process:
        async with place.client() as stub:
            with pytest.raises(errors.UnavailableError):
                await live(stub, labels, acknowledged)
        # Each step is reached: the process was killed there, and not by anything else.
        assert process.wait(20) == -signal.SIGKILL
    with place.serving(*strategy):
        listed = await place.check_nothing_is_for_nothing()
        assert acknowledged <= listed.keys() <= {"ns/1/extract-1", "layer", "container"}
        # What is left can be used, and what is gone can be made again.
        async with place.client() as stub:
            for key in ("container", "layer", "ns/1/extract-1"):
                if key in listed:
                    await stub.Remove(pb.RemoveSnapshotRequest(key=key))
            await live(stub, labels, acknowledged)
        assert await place.check_nothing_is_for_nothing() == {}


def test_an_unknown_step_is_refused(place: alone.Alone) -> None:
    with place.serving(environment={"NIXLET_FAULT_POINT": "nowhere"}) as process:
        assert process.wait(20) == 2
    assert "there is no fault point 'nowhere'" in place.log.read_text()
