"""What a node looks at before it says that it is ready."""

import asyncio
import os
from pathlib import Path
from unittest import mock

import pytest

from nixlet import errors
from nixlet.host import children, supervisor, unixsocket
from nixlet.node.lifecycle import assembly
from nixlet.node.settings import config as node_config
from nixlet.services import health
from nixlet.snapshots import model, snapshotter
from nixlet.telemetry import metrics


async def test_a_snapshotter_whose_database_takes_no_changes_is_not_ready(tmp_path: Path) -> None:
    made = snapshotter.Snapshotter(
        str(tmp_path / "root"),
        store_dir="/nix/store",
        real_store_dir=str(tmp_path),
        realise=mock.sentinel.realiser,
        gc_roots=mock.Mock(),
    )
    socket = str(tmp_path / "snapshotter.sock")
    with unixsocket.listen(socket):
        checks = assembly._checks(
            mock.Mock(),
            mock.Mock(snapshotter=made),
            mock.Mock(socket=socket),
            mock.Mock(),
            node_config.Layout(str(tmp_path), str(tmp_path)),
        )
        await checks["snapshotter"]()
        await made.close()
        assert made.counts() == dict.fromkeys(model.Kind, 0)
        with pytest.raises(errors.UnavailableError, match=r"nixlet\.db is closed"):
            await checks["snapshotter"]()


async def test_children_have_lines_of_their_own_also_those_that_come_later(tmp_path: Path) -> None:
    def program(name: str) -> supervisor.Program:
        async def ready() -> None:
            while not (tmp_path / f"{name} is up").exists():
                await asyncio.sleep(0.01)

        return supervisor.Program(
            name=name,
            argv=["sleep", "60"],
            env=dict(os.environ),
            log_path=str(tmp_path / name),
            ready=ready,
            ready_timeout=60,
        )

    async def has_room() -> None:
        raise errors.ResourceExhaustedError("full")

    async with children.kept_running() as kept:
        kept.start(program("containerd"))
        registry = metrics.Registry()
        registry.add(*assembly._child_metrics(kept))
        told = health.Health({"disk": has_room}, registry, {}, assembly._further(kept, kept["containerd"]))
        (status, _, text) = await told.answer("/readyz")
        assert (status, text) == (503, "[-]disk failed: full\nreadyz check failed\n")
        # Called like a check, which it must not hide.
        kept.start(program("disk"), program("etcd"))
        (tmp_path / "etcd is up").touch()
        await kept.ready("etcd")
        _, _, text = await told.answer("/readyz")
        assert sorted(text.splitlines()[:-1]) == [
            "[+]child/etcd ok",
            "[-]child/disk failed: disk is being started and is not ready yet",
            "[-]disk failed: full",
        ]
        _, _, text = await told.answer("/metrics")
        assert 'nixlet_child_up{child="etcd"} 1\n' in text
        assert 'nixlet_child_up{child="disk"} 0\n' in text
        assert 'nixlet_child_restarts_total{child="etcd"} 0\n' in text
        # One that the node has from somebody else leaves its children's lines as they are.
        assert list(assembly._further(kept, None)()) == ["child/containerd", "child/disk", "child/etcd"]
