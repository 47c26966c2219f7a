"""Verbs find the node that the configuration file describes."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from nixlet import errors
from nixlet.cli import options


@click.command()
@options.node_directories
def verb(data_dir: str, state_dir: str) -> None:
    click.echo(f"{data_dir} {state_dir}")


def said(*arguments: str, **environment: str) -> str:
    done = CliRunner(env={"NIXLET_STATE_DIR": None, "NIXLET_DATA_DIR": None, **environment}).invoke(
        verb, list(arguments), catch_exceptions=False
    )
    return done.output.strip()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("state-dir: /run/elsewhere\n")
    return path


def test_the_files_directories_are_taken(file: Path) -> None:
    assert said(NIXLET_CONFIG_FILE=str(file)) == "/var/lib/nixlet /run/elsewhere"


def test_flags_and_variables_win(file: Path) -> None:
    assert said("--state-dir", "/run/flag", NIXLET_CONFIG_FILE=str(file)) == "/var/lib/nixlet /run/flag"
    assert said(NIXLET_STATE_DIR="/run/variable", NIXLET_CONFIG_FILE=str(file)) == "/var/lib/nixlet /run/variable"


def test_drop_ins_count(file: Path) -> None:
    directory = Path(f"{file}.d")
    directory.mkdir()
    (directory / "10.yaml").write_text("data-dir: /srv/nixlet\n")
    assert said(NIXLET_CONFIG_FILE=str(file)) == "/srv/nixlet /run/elsewhere"


def test_no_file_no_question() -> None:
    assert said(NIXLET_CONFIG_FILE="/dev/null") == "/var/lib/nixlet /run/nixlet"


def test_a_mistake_in_the_file_is_said(file: Path) -> None:
    file.write_text("state_dir: /run/elsewhere\n")
    with pytest.raises(errors.UsageError, match="line 1: state_dir is not a known key"):
        said(NIXLET_CONFIG_FILE=str(file))
