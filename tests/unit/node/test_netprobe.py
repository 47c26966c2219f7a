"""What a firewall's rules say of pods, and what the programs of a node must be like."""

import os
import struct
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.node import netprobe, preflight

DOCKER = """-P FORWARD DROP
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
"""


@pytest.mark.parametrize(
    ("rules", "dropped"),
    [
        ("-P FORWARD ACCEPT\n", False),
        (DOCKER, True),
        (f"{DOCKER}-A FORWARD -i nixlet0 -j ACCEPT\n", False),
        (f"{DOCKER}-A FORWARD -s 10.63.0.0/16 -j ACCEPT\n", False),
        # Another bridge, and a rule that does something else.
        (f"{DOCKER}-A FORWARD -i nixlet01 -j ACCEPT\n", True),
        (f"{DOCKER}-A FORWARD -i nixlet0 -j LOG\n", True),
        ("", False),
    ],
)
def test_who_is_let_through(rules: str, dropped: bool) -> None:
    assert netprobe.drops(rules, "nixlet0", "10.63.0.0/16") is dropped


def elf(kind: int, order: str, program_headers: list[int]) -> bytes:
    """The head of a program: 32 bits (1) or 64 (2), with program headers of some types."""
    size = {1: 32, 2: 56}[kind]
    head = bytearray(64)
    head[:6] = b"\x7fELF" + bytes([kind, 1 if order == "<" else 2])
    if kind == 1:
        struct.pack_into(f"{order}I", head, 28, 64)
        struct.pack_into(f"{order}HH", head, 42, size, len(program_headers))
    else:
        struct.pack_into(f"{order}Q", head, 32, 64)
        struct.pack_into(f"{order}HH", head, 54, size, len(program_headers))
    return bytes(head) + b"".join(struct.pack(f"{order}I", each).ljust(size, b"\xff") for each in program_headers)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 2])
def test_static_programs_of_all_kinds(tmp_path: Path, kind: int, order: str) -> None:
    program = tmp_path / "program"
    program.write_bytes(elf(kind, order, [6, 1, 1]))
    preflight.check_static(str(program))
    program.write_bytes(elf(kind, order, [6, 3, 1]))
    with pytest.raises(errors.UnsupportedError, match="is not static") as raised:
        preflight.check_static(str(program))
    assert "--pause" in raised.value.hint


def test_real_programs() -> None:
    preflight.check_static("/usr/bin/catatonit")
    with pytest.raises(errors.UnsupportedError, match="/bin/ls is not static"):
        preflight.check_static("/bin/ls")


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF\x09" + bytes(60)])
def test_what_is_no_program(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pause").write_bytes(content)
    with pytest.raises(errors.UnsupportedError, match="is no ELF program"):
        preflight.check_static(str(tmp_path / "pause"))


def test_the_shim_beside_containerd_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for directory in ("beside", "elsewhere"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "containerd-shim-runc-v2").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/elsewhere")
    containerd = f"{tmp_path}/beside/containerd"
    assert preflight.find_shim(containerd) == f"{tmp_path}/beside/containerd-shim-runc-v2"
    os.unlink(tmp_path / "beside/containerd-shim-runc-v2")
    assert preflight.find_shim(containerd) == f"{tmp_path}/elsewhere/containerd-shim-runc-v2"
    os.unlink(tmp_path / "elsewhere/containerd-shim-runc-v2")
    with pytest.raises(errors.UnavailableError, match="neither beside"):
        preflight.find_shim(containerd)
