"""Where a person is who writes relative paths."""

import os
from pathlib import Path

import pytest

from nixlet.cli import options


def test_the_working_directory_is_told_where_there_is_one_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign, gone = os.fsencode(tmp_path) + b"/\xff", tmp_path / "gone"
    os.mkdir(foreign)
    gone.mkdir()
    monkeypatch.chdir(tmp_path)
    assert options.working_directory() == str(tmp_path)
    os.chdir(foreign)
    assert options.working_directory() is None
    os.chdir(gone)
    gone.rmdir()
    assert options.working_directory() is None
