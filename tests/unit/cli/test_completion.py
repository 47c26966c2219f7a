"""What a shell gets that asks for completions, also where no node answers; with one: system/test_everyday_verbs.py."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nixlet.services import nodeaddress


def completed(words: str, **environment: str) -> tuple[list[str], str, int]:
    """The words that a shell is offered for the last one, what else was said, and the exit status."""
    more = {"_NIXLET_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "nixlet"],
        env={**os.environ, **more, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return [line.partition(",")[2] for line in done.stdout.split()], done.stderr, done.returncode


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("nixlet ex", ["exec"]),
        ("nixlet kube pl", ["play"]),
        ("nixlet run --netw", ["--network"]),
        ("nixlet run --network ho", ["host"]),
        ("nixlet server --sel", ["--selinux"]),
        ("nixlet completion z", ["zsh"]),
        ("nixlet server --rootl", ["--rootless"]),
        ("nixlet server --cluster-res", []),
        ("nixlet server --tok", ["--token", "--token-file"]),
    ],
)
def test_what_is_declared_is_completed(words: str, found: list[str]) -> None:
    assert completed(words) == (found, "", 0)


@pytest.mark.parametrize("verb", ["exec", "attach", "logs", "inspect", "stats", "stop", "rm"])
def test_without_a_node_there_are_no_containers(tmp_path: Path, verb: str) -> None:
    assert completed(f"nixlet {verb} a", NIXLET_STATE_DIR=str(tmp_path)) == ([], "", 0)


def test_who_waits_for_completions_does_so_for_a_while_only(tmp_path: Path) -> None:
    """A node that doesn't answer, which a real one does only where it hangs; the test's own limit would be passed."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / nodeaddress.SOCKET))
        listening.listen()
        assert completed(f"nixlet rm --state-dir {tmp_path} a") == ([], "", 0)
        accepted, _ = listening.accept()
        with accepted:
            assert b"ListContainers" in accepted.recv(1024)


def test_a_configuration_that_is_wrong_is_nothing_for_a_line_that_is_being_written(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("state-dir: [")
    environment = {"NIXLET_CONFIG_FILE": str(tmp_path / "config.yaml"), "NIXLET_STATE_DIR": ""}
    assert completed("nixlet rm a", **environment) == ([], "", 0)
