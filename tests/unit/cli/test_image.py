"""``nixlet image``: what it takes for an archive."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from support import image_archives as made

LOAD = [sys.executable, "-m", "nixlet", "image", "load", "--address", "/nowhere"]


def test_a_terminal_is_no_archive() -> None:
    person, terminal = pty.openpty()
    try:
        done = subprocess.run(LOAD, stdin=terminal, capture_output=True, text=True, timeout=30, check=False)
    finally:
        os.close(person)
        os.close(terminal)
    assert (done.returncode, done.stdout) == (2, "")
    assert "name an ARCHIVE, or pipe one to standard input" in done.stderr


@pytest.mark.parametrize("begun", [False, True])
def test_standard_input_may_be_a_file(tmp_path: Path, *, begun: bool) -> None:
    """From where it stands: what was read of it before isn't the archive's."""
    data = made.tar(made.oci(architecture="riscv64"))
    (tmp_path / "file").write_bytes((b"before" if begun else b"") + data)
    with (tmp_path / "file").open("rb") as file:
        file.seek(6 if begun else 0)
        done = subprocess.run([*LOAD, "-"], stdin=file, capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr.startswith("error: standard input: the image is for linux/riscv64, this machine is")


def test_a_directory_is_to_be_packed(tmp_path: Path) -> None:
    done = subprocess.run([*LOAD, str(tmp_path)], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 125
    assert done.stderr.endswith(f"hint: pack it: tar -C {tmp_path} -c . | nixlet image load\n")
