"""What becomes of the command line when its standard streams are closed, full or read by nobody, and of odd arguments."""

import json
import os
import subprocess
import sys

import pytest

from nixlet.cli import app

NIXLET = [sys.executable, "-P", "-m", "nixlet"]


def shell(redirection: str, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
    script = f'exec "$@" {redirection}'
    argv = ["sh", "-c", script, "sh", *NIXLET, *arguments]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)


@pytest.mark.parametrize("redirection", [">&-", "<&- >&- 2>&-", "<&-", ">/dev/null"])
def test_streams_that_are_closed_are_nobodys_trouble(redirection: str) -> None:
    done = shell(redirection, "completion", "bash")
    assert (done.returncode, done.stderr) == (0, b"")


def test_nothing_that_is_opened_gets_the_number_of_a_closed_stream() -> None:
    program = "import json, os, sys; from nixlet.cli import streams; streams.prepare(); fd = os.open('/', os.O_RDONLY)"
    program += "; print('lost'); print(json.dumps([fd, *map(os.get_inheritable, (0, 1, 2))]), file=sys.stderr)"
    argv = ["sh", "-c", 'exec "$@" <&- >&-', "sh", sys.executable, "-P", "-c", program]
    done = subprocess.run(argv, capture_output=True, check=True)
    fd, *inheritable = json.loads(done.stderr)
    assert fd > 2
    assert inheritable == [True, True, True]


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*NIXLET, "completion", "bash"],
            stdout=writer,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_output_that_is_lost_while_somebody_wants_it_is_told() -> None:
    done = shell(">/dev/full", "completion", "bash")
    assert done.returncode == 125
    assert done.stderr.startswith(b"error: standard output can't be written: No space left on device\nhint: make room")


def test_a_containers_own_debug_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["run", "--state-dir", "/none", "image", "--", "--debug"]) == 125
    assert capsys.readouterr().err.startswith("error: no node runs at /none\n")


def test_arguments_that_are_not_utf_8(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["run", "--state-dir", "/none", "image", os.fsdecode(b"a\xff")]) == 2
    assert capsys.readouterr().err.startswith("error: the argument b'a\\xff' is not UTF-8\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--restart", "always", "x"],
            "error: nixlet run has no --restart\nhint: nothing restarts containers by itself",
        ),
        (["--gpus", "all", "x"], "error: nixlet run has no --gpus\nhint: devices come with a runtime"),
        (["--interactve", "x"], "did you mean --interactive?"),
        (["-h"], "option '-h' requires an argument"),
    ],
)
def test_options_that_run_has_not(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert app.run(["run", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_what_has_little_in_common_is_not_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["ps", "--gpus"]) == 2
    assert "Did you mean" not in capsys.readouterr().err
