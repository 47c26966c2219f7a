"""Variables by the command line and by files."""

from pathlib import Path

import pytest

from nixlet import errors
from nixlet.cli import variables


def test_variables_of_files_and_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# said\nA=1\n\n  B=two words \nHOME\nMISSING\nC=a=b\n")
    ours = {"HOME": "/root", "TERM": "xterm"}
    assert variables.environment(["B=3", "TERM", "NOT_OURS", "D="], [str(file)], ours) == (
        ("A", "1"),
        ("B", "3"),
        ("HOME", "/root"),
        ("C", "a=b"),
        ("TERM", "xterm"),
        ("D", ""),
    )


def test_a_file_of_variables_is_read_as_docker_reads_it(tmp_path: Path) -> None:
    """A mark in front, both kinds of line ends, and characters that are line ends to Python alone."""
    file = tmp_path / "env"
    file.write_bytes("\ufeffA=1\r\nB=x\u0085y\fz\u2028\x1cw\nC=\r\r\n\tD=4".encode())
    assert variables.environment([], [str(file)], {}) == (
        ("A", "1"),
        ("B", "x\u0085y\fz\u2028\x1cw"),
        ("C", "\r"),
        ("D", "4"),
    )


def test_malformed_variables_are_told_with_their_place(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("A=1\n=x\n")
    with pytest.raises(errors.UsageError, match=r"env, line 2: '=x' is not NAME=VALUE"):
        variables.environment([], [str(file)], {})
    with pytest.raises(errors.UsageError, match="--env 'A B=1' is not NAME=VALUE"):
        variables.environment(["A B=1"], [], {})
    with pytest.raises(errors.UsageError, match="can't be read: No such file or directory"):
        variables.environment([], [str(tmp_path / "missing")], {})
    file.write_bytes(b"A=1\n# \xff\n")
    with pytest.raises(errors.UsageError, match="env, line 2: this is not UTF-8"):
        variables.environment([], [str(file)], {})
    with pytest.raises(errors.UsageError, match="--env A: its value here is not UTF-8"):
        variables.environment(["A"], [], {"A": "\udcff"})
