"""The place of our containerd's socket, where somebody else's containerd is used."""

import dataclasses
import socket
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.node.lifecycle import endpoint
from nixlet.node.settings import config


def test_what_is_no_socket_is_not_deleted(tmp_path: Path) -> None:
    layout = config.Layout(str(tmp_path / "data"), str(tmp_path))
    settings = dataclasses.replace(config.Settings(), container_runtime_endpoint=str(tmp_path / "theirs.sock"))
    place = Path(layout.containerd_socket)
    place.parent.mkdir()
    place.write_text("precious")
    with (
        pytest.raises(errors.FailedPreconditionError, match="exists and is no socket"),
        endpoint.linked(settings, layout),
    ):
        pass
    assert place.read_text() == "precious"
    place.unlink()
    (place / "inside").mkdir(parents=True)
    with (
        pytest.raises(errors.FailedPreconditionError, match="exists and is no socket"),
        endpoint.linked(settings, layout),
    ):
        pass
    (place / "inside").rmdir()
    place.rmdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place))
    with endpoint.linked(settings, layout):
        assert str(place.readlink()) == str(tmp_path / "theirs.sock")
        # Somebody puts something else there.
        place.unlink()
        place.write_text("precious")
    assert place.read_text() == "precious"
    place.unlink()
    place.symlink_to("nowhere")
    with endpoint.linked(settings, layout):
        pass
    assert not place.is_symlink()
