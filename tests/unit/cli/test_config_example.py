"""``nixlet config example``, and who takes a node away as a unit starts it."""

import contextlib
import dataclasses
import io
import os
import re
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.cli import app, options
from nixlet.node.settings import config, configfile, names


def printed(*arguments: str) -> str:
    parsed = app.parse(arguments)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        parsed.verb.run(**parsed.values)
    return output.getvalue()


def test_the_example_says_nothing_and_names_every_key(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(printed("config", "example"))
    read = configfile.load({}, {}, file=str(file))
    assert read.settings == config.Settings()
    assert {origin.source for origin in read.origins.values()} == {"default"}
    # Nobody reads YAML for a file of comments.
    assert not options._may_say(str(file))
    file.write_text(f"{file.read_text()}\ndata-dir: /x\n")
    assert options._may_say(str(file))
    # Each line, taken for itself, says the default.
    file.write_text(re.sub(r"^#(\S+: )", r"\1", printed("config", "example"), flags=re.MULTILINE))
    read = configfile.load({}, {}, file=str(file))
    assert {name for name, origin in read.origins.items() if origin.source == "file"} == {
        field.name for field in dataclasses.fields(config.Settings)
    }
    assert [getattr(read.settings, name) or None for name in read.origins] == [
        getattr(config.Settings(), name) or None for name in read.origins
    ]


def test_keys_that_only_a_comment_has(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    # YAML ends lines at carriage returns as well.
    for text, may in (
        ("# data-dir: /x\n", False),
        ("# a\rdata-dir: /x\n", True),
        ("debug: true # dir\n", True),
        ("  # dir", False),
    ):
        file.write_bytes(text.encode())
        assert options._may_say(str(file)) == may


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    made = tmp_path / "nixlet.service"
    (tmp_path / "env").write_text('NIXLET_STATE_DIR="/run/nixlet-test/no"\nNIXLET_CONFIG_FILE=/dev/null\n')
    made.write_text(f"[Service]\nEnvironmentFile={tmp_path}/env\nExecStart=/nixlet server --data-dir {tmp_path}/data\n")
    return made


@pytest.mark.parametrize("more", [(), ("--pods-only",), ("--yes",), ("--pods-only", "--yes")])
def test_a_unit_whose_node_never_started(unit: Path, more: tuple[str, ...]) -> None:
    said = printed("uninstall", "--unit", str(unit), "--ignore-missing", *more)
    assert said == f"Nothing is to be done: there is no node at {unit.parent}/data.\n"
    with pytest.raises(errors.NotFoundError):
        printed("uninstall", "--unit", str(unit), *more)


def test_flags_besides_win_over_the_unit(unit: Path) -> None:
    said = printed("uninstall", "--unit", str(unit), "--data-dir", "/nowhere", "--ignore-missing")
    assert said == "Nothing is to be done: there is no node at /nowhere.\n"


def test_a_unit_that_was_changed_by_a_drop_in_and_logs_more(unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``systemctl edit`` does it, and as the variables of a service are."""
    monkeypatch.setenv("PATH", "/before")
    (unit.parent / "env").write_text('NIXLET_DEBUG="true"\nNIXLET_CONFIG_FILE=/dev/null\nPATH="/programs:/bin"\n')
    drop_in = Path(f"{unit}.d/override.conf")
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nExecStart=\nExecStart=/nixlet server --data-dir /elsewhere\n")
    said = printed("uninstall", "--unit", str(unit), "--ignore-missing")
    assert said == "Nothing is to be done: there is no node at /elsewhere.\n"
    # What the node found by its own PATH is looked for there.
    assert os.environ["PATH"] == "/programs:/bin"
    drop_in.write_text("[Service]\nExecStart=\nExecStart=/nixlet server --nonsense\n")
    with pytest.raises(errors.UsageError, match="there is no option --nonsense"):
        printed("uninstall", "--unit", str(unit))


def test_a_unit_that_starts_no_node(unit: Path) -> None:
    unit.write_text("[Service]\nExecStart=/nixlet snapshotter\n")
    with pytest.raises(errors.UsageError, match="starts no node"):
        printed("uninstall", "--unit", str(unit))


def test_the_example_is_read_by_default() -> None:
    assert printed("config", "example").startswith(f"# {names.DEFAULT_FILE}:")
