"""Files of a node's own that a disk or a person has damaged: none ends a start without a word."""

from pathlib import Path

import pytest

from nixlet import errors
from nixlet.images import opening
from nixlet.node.children import containerd_child
from nixlet.node.cluster.network import flannel, podnetwork
from nixlet.node.cluster.preflight import made, versions
from nixlet.node.images import preload
from nixlet.node.manifests import objects
from nixlet.node.ownership import marker
from nixlet.node.settings import config

DAMAGED = pytest.mark.parametrize(
    "text", [b"", b"\x00" * 4096, b'{"\xff":1}', b'{"a":' * 100_000, b"[]", b"{"], ids=lambda text: repr(text[:6])
)


@pytest.fixture
def layout(tmp_path: Path) -> config.Layout:
    found = config.Layout(str(tmp_path / "data"), str(tmp_path / "state"))
    for directory in (found.data_dir, found.state_dir, found.agent):
        Path(directory).mkdir(parents=True, exist_ok=True)
    return found


@DAMAGED
async def test_what_is_only_remembered_is_found_out_again(layout: config.Layout, text: bytes, tmp_path: Path) -> None:
    memories = (versions.memory(layout), flannel.memory(layout))
    for path in (layout.containerd_answers, *memories, preload.cache_file(str(tmp_path))):
        Path(path).write_bytes(text)
    assert containerd_child._read(layout) is None
    assert versions._read(layout) == []
    assert flannel._made(layout) is None
    opener = opening.Opener(str(tmp_path))
    preloading = preload.Preload(str(tmp_path), None, None, None, opener, None, [])  # type: ignore[arg-type]  # nobody is asked
    assert preloading._read_cache() == {}


@DAMAGED
def test_what_nobody_else_knows_is_told(layout: config.Layout, text: bytes) -> None:
    Path(marker.path(layout.data_dir)).write_bytes(text)
    with pytest.raises(errors.FailedPreconditionError, match="doesn't say what node this is"):
        marker.read(layout.data_dir)
    Path(podnetwork.memory(layout)).write_bytes(text)
    with pytest.raises(errors.FailedPreconditionError, match="doesn't say what the network of this node's pods is"):
        podnetwork.remembered(layout)


def test_a_record_in_the_cluster_that_is_nested_too_deep_is_told() -> None:
    with pytest.raises(errors.FailedPreconditionError, match="the cluster's record of what manifests made can't"):
        objects.records('{"items":' * 100_000)


@DAMAGED
def test_what_a_cluster_was_made_with_is_not_guessed(layout: config.Layout, text: bytes) -> None:
    Path(made.memory(layout)).parent.mkdir(parents=True)
    Path(made.memory(layout)).write_bytes(text)
    with pytest.raises(errors.FailedPreconditionError, match="doesn't say what the cluster was made with"):
        made.remembered(layout)
