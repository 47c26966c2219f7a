"""Verbs find the node that the configuration file describes."""

import os
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.cli import app


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of this machine counts."""
    for name in ("STATE_DIR", "DATA_DIR", "CONFIG_FILE"):
        monkeypatch.delenv(f"NIXLET_{name}", raising=False)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("state-dir: /run/elsewhere\n")
    monkeypatch.setenv("NIXLET_CONFIG_FILE", str(path))
    return path


def said(*arguments: str) -> tuple[str, str]:
    values = app.parse(["crictl", *arguments]).values
    return values["data_dir"], values["state_dir"]


def test_the_files_directories_are_taken(file: Path) -> None:
    assert said() == ("/var/lib/nixlet", "/run/elsewhere")


def test_flags_and_variables_win(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said("--state-dir", "/run/flag") == ("/var/lib/nixlet", "/run/flag")
    monkeypatch.setenv("NIXLET_STATE_DIR", "/run/variable")
    assert said() == ("/var/lib/nixlet", "/run/variable")


def test_drop_ins_count(file: Path) -> None:
    directory = Path(f"{file}.d")
    directory.mkdir()
    (directory / "10.yaml").write_text("data-dir: /srv/nixlet\n")
    assert said() == ("/srv/nixlet", "/run/elsewhere")


def test_no_file_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIXLET_CONFIG_FILE", "/dev/null")
    assert said() == ("/var/lib/nixlet", "/run/nixlet")


def test_a_mistake_in_the_file_is_said(file: Path) -> None:
    file.write_text("state_dir: /run/elsewhere\n")
    with pytest.raises(errors.UsageError, match="line 1: state_dir is not a known key"):
        said()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("state-dir: /run/elsewhere", "/run/elsewhere"),
        ('"state\\x2ddir": /run/elsewhere', "/run/elsewhere"),
        ("# Zustände\nstate-dir: /run/elsewhere", "/run/elsewhere"),
        ("snapshotter: native", "/run/nixlet"),
        ("", "/run/nixlet"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_however_it_is_written(file: Path, text: str, found: str, encoding: str) -> None:
    file.write_text(text, encoding=encoding)
    assert said() == ("/var/lib/nixlet", found)


def test_what_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        monkeypatch.setenv("NIXLET_CONFIG_FILE", str(path))
        with pytest.raises(errors.UsageError, match=r"is not a regular file|can't be read"):
            said()


def test_a_file_that_says_nothing_of_directories_is_not_waited_for(file: Path) -> None:
    """Also where it is wrong: that is for the node to say, and verbs go on finding it."""
    file.write_text("snapshotter: [native\n")
    assert said() == ("/var/lib/nixlet", "/run/nixlet")
