"""Listening sockets: who may open them, and what is replaced."""

import os
import socket
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import unixsocket


def test_a_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    with unixsocket.listen(str(tmp_path / "d" / "s.sock")):
        assert (tmp_path / "d").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "d" / "s.sock").stat().st_mode & 0o777 == 0o600


def test_a_served_socket_is_not_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "d" / "s.sock")
    with unixsocket.listen(path), pytest.raises(errors.FailedPreconditionError, match="another process serves"):
        unixsocket.listen(path)
    # Closed and left behind: stale, so it is replaced.
    assert os.path.exists(path)
    unixsocket.listen(path).close()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(errors.FailedPreconditionError, match="is no socket"):
        unixsocket.listen(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


def test_a_path_that_is_too_long_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.FailedPreconditionError, match="can't listen on"):
        unixsocket.listen(str(tmp_path / ("x" * 120)))


def test_is_served(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    assert not unixsocket.is_served(path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        assert not unixsocket.is_served(path)
        sock.listen()
        assert unixsocket.is_served(path)
