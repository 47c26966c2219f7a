"""What a node knows of its directories, and what it takes for its own."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.cli import app
from nixlet.node.lifecycle import standalone, uninstall
from nixlet.node.ownership import marker
from nixlet.node.settings import config


def layout(data: Path, state: Path) -> config.Layout:
    for directory in (data, state):
        directory.mkdir(parents=True, exist_ok=True)
    return config.Layout(str(data), str(state))


def start(data: Path, state: Path, *, gc_roots: str = "", bridge_is_there: bool = False, **settings: Any) -> None:
    """What a start does to the marks."""
    made = layout(data, state)
    marker.check(made)
    told = dataclasses.replace(config.Settings(), data_dir=str(data), state_dir=str(state), **settings)
    marker.write(told, made, gc_roots, bridge_is_there=bridge_is_there)


def known(data: Path) -> marker.Marker:
    found = marker.read(str(data))
    assert found is not None
    return found


def test_a_copy_inherits_nothing_and_a_moved_node_all(tmp_path: Path) -> None:
    original, copy, moved = tmp_path / "data", tmp_path / "copy", tmp_path / "moved"
    start(original, tmp_path / "run", gc_roots="/roots/1", log="/var/log/1", bridge="bridge1")
    shutil.copytree(original, copy)
    start(copy, tmp_path / "run2", gc_roots="/roots/2", log="/var/log/2", bridge="bridge2")
    of_copy = known(copy)
    assert (of_copy.gc_roots, of_copy.logs, of_copy.bridges) == (("/roots/2",), ("/var/log/2",), ("bridge2",))
    assert of_copy.state_dirs == (str(tmp_path / "run2"),)
    assert known(original).gc_roots == ("/roots/1",)
    original.rename(moved)
    start(moved, tmp_path / "run", gc_roots="/roots/3", bridge="bridge1")
    assert known(moved).gc_roots == ("/roots/1", "/roots/3")
    assert known(moved).logs == ("/var/log/1",)


def test_a_copy_of_a_snapshotters_root_inherits_nothing(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    marker.write_snapshotter(str(tmp_path / "root"), "/run/1.sock", "/roots/1")
    shutil.copytree(tmp_path / "root", tmp_path / "copy")
    marker.write_snapshotter(str(tmp_path / "copy"), "/run/2.sock", "/roots/2")
    assert (known(tmp_path / "copy").gc_roots, known(tmp_path / "copy").sockets) == (("/roots/2",), ("/run/2.sock",))


@pytest.mark.parametrize("endpoint", ["", "/run/theirs.sock"])
def test_the_state_directory_of_another_node_is_refused(tmp_path: Path, endpoint: str) -> None:
    """Also where nothing of containerd's is in it, since that node uses somebody else's."""
    start(tmp_path / "a", tmp_path / "run", container_runtime_endpoint=endpoint)
    with pytest.raises(errors.FailedPreconditionError, match=f"state directory of the node at {tmp_path}/a"):
        start(tmp_path / "b", tmp_path / "run")
    assert marker.is_of(str(tmp_path / "run"), str(tmp_path / "a"))
    # A copy of its data knows of the state directory as well.
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    with pytest.raises(errors.FailedPreconditionError, match=f"state directory of the node at {tmp_path}/a"):
        start(tmp_path / "copy", tmp_path / "run")
    # Where there is no such node any more, it is free.
    (tmp_path / "a").rename(tmp_path / "moved")
    start(tmp_path / "moved", tmp_path / "run")
    shutil.rmtree(tmp_path / "moved")
    start(tmp_path / "c", tmp_path / "run")


def test_a_mark_that_can_not_be_read_stops_no_start(tmp_path: Path) -> None:
    start(tmp_path / "a", tmp_path / "run")
    for directory in ("a", "run"):
        (tmp_path / directory / "nixlet.json").write_text("{")
    start(tmp_path / "a", tmp_path / "run")
    assert known(tmp_path / "run").data_dir == str(tmp_path / "a")


def test_a_bridge_that_was_there_first_is_not_ours(tmp_path: Path) -> None:
    start(tmp_path / "a", tmp_path / "run", bridge="br0", bridge_is_there=True)
    assert known(tmp_path / "a").bridges == ()
    start(tmp_path / "a", tmp_path / "run", bridge="br0")
    start(tmp_path / "a", tmp_path / "run", bridge="br0", bridge_is_there=True)
    assert known(tmp_path / "a").bridges == ("br0",)


def test_a_snapshotter_takes_no_directory_that_is_not_its_own(tmp_path: Path) -> None:
    root = tmp_path / "root"
    marker.check_snapshotter(str(root))
    (root / "lost+found").mkdir(parents=True)
    marker.check_snapshotter(str(root))
    (root / "photos").mkdir()
    with pytest.raises(errors.FailedPreconditionError, match="no snapshotter's directory: photos is in it"):
        marker.check_snapshotter(str(root))
    (root / "lock").touch()
    marker.check_snapshotter(str(root))
    start(tmp_path / "node", tmp_path / "run")
    for inside in ("node", "node/agent/containerd"):
        with pytest.raises(errors.FailedPreconditionError, match=f"lies in the directory {tmp_path}/node of a node"):
            marker.check_snapshotter(str(tmp_path / inside))
    marker.write_snapshotter(str(root), "/run/1.sock", "")
    with pytest.raises(errors.FailedPreconditionError, match="is the root of a snapshotter"):
        start(root, tmp_path / "run2")


@pytest.mark.parametrize("key", ["root", "address", "image_service.containerd_address"])
def test_an_empty_place_is_not_the_working_directory(tmp_path: Path, key: str) -> None:
    table, _, name = key.rpartition(".")
    (tmp_path / "config.toml").write_text((f"[{table}]\n" if table else "") + f'{name} = ""\n')
    with pytest.raises(errors.UsageError, match=f"{key} is empty"):
        standalone.read_settings(str(tmp_path / "config.toml"), {})


def test_a_snapshotter_takes_away_what_it_made_and_no_more(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("snapshots", "views", "spare", "lost+found", ".probe-1"):
        (root / name).mkdir(parents=True)
    for name in ("lock", "nixlet.db", "nixlet.db-wal", "probe.json", "mine.txt"):
        (root / name).touch()
    marker.write_snapshotter(str(root), str(tmp_path / "s.sock"), "")
    plan = uninstall.plan_snapshotter(str(root))
    ours = {"snapshots", "views", "spare", ".probe-1", "lock", "nixlet.db", "nixlet.db-wal", "probe.json"}
    assert set(plan.trees) == {str(root / name) for name in ours | {"nixlet.json"}}
    assert plan.emptied == (str(root),)
    assert plan.kept[:2] == tuple(
        f"{root}/{name}, which is not the snapshotter's" for name in ("lost+found", "mine.txt")
    )


def test_the_pods_of_somebody_elses_containerd_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path / "a", tmp_path / "run", container_runtime_endpoint="/run/theirs.sock")
    assert "the pods and images of the containerd at /run/theirs.sock" in uninstall.plan(str(tmp_path / "a"), {}).kept
    assert app.run(["uninstall", "--data-dir", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "  the pods and images of the containerd at /run/theirs.sock" in shown.partition("Kept:")[2]
    assert "all pods" not in shown
    start(tmp_path / "b", tmp_path / "run2")
    assert app.run(["uninstall", "--data-dir", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "  all pods and images of this node" in shown.partition("Kept:")[0]
