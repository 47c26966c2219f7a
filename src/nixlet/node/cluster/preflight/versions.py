"""The versions of a cluster's programs: asked of each, remembered for one boot of the machine, and whether they go together."""

import asyncio
import contextlib
import os
import re
from collections.abc import Mapping

import msgspec

from nixlet import errors
from nixlet.cluster.layout import Layout
from nixlet.encoding import unreadable
from nixlet.host import files, process
from nixlet.node.cluster.preflight import finding

#: How many minor versions a program may be behind the API server, which none may be ahead of (Kubernetes: "Version Skew Policy").
_BEHIND = {"kube-controller-manager": 1, "kube-scheduler": 1, "kubelet": 3, "kube-proxy": 3}

#: Seconds for one answer: these are large programs, and the machine may be busy with others.
_TIMEOUT = 60.0


class _Asked(msgspec.Struct, frozen=True):
    """What a program said, and what tells it from others (and from itself after an update)."""

    program: tuple[str, int, int, int, int]
    version: str


async def ask(found: finding.Found, layout: Layout) -> Mapping[str, str]:
    """The version of each program, as in "1.36.3"; empty where it says none.

    Raises:
        CommandFailedError: One doesn't run.
    """
    known = {each.program: each.version for each in _read(layout)}
    marks = {name: _mark(path) for name, path in found.programs.items()}
    missing = [name for name, mark in marks.items() if mark not in known]
    said = await asyncio.gather(*(_ask(found.programs[name]) for name in missing))
    known |= {marks[name]: version for name, version in zip(missing, said, strict=True)}
    if missing:
        _remember(layout, [_Asked(mark, known[mark]) for mark in marks.values()])
    return {name: known[mark] for name, mark in marks.items()}


async def checked(found: finding.Found, layout: Layout) -> Mapping[str, str]:
    """The same, of programs that go together.

    Raises:
        CommandFailedError: One doesn't run.
        FailedPreconditionError: They don't go together.
    """
    said = await ask(found, layout)
    check(said)
    return said


async def _ask(path: str) -> str:
    printed = (await process.run([path, "--version"], timeout=_TIMEOUT)).check()
    match = re.search(rb"v?(\d+\.\d+\.\d+)", printed.stdout + printed.stderr)
    # One that was built without being told its version says so.
    return "" if match is None or match[1].startswith(b"0.0.") else match[1].decode()


async def takes_variable(path: str, variable: str) -> bool:
    """Whether a program says in its help that it takes a variable of the environment.

    Raises:
        CommandFailedError: It doesn't run.
    """
    return variable.encode() in (await process.run([path, "--help"], timeout=_TIMEOUT)).check().stdout


def check(versions: Mapping[str, str]) -> None:
    """Check that programs of these versions go together.

    Raises:
        FailedPreconditionError: They don't.
    """
    server = versions.get("kube-apiserver", "")
    if not server:
        return
    for name, most in _BEHIND.items():
        version = versions.get(name, "")
        if not version:
            continue
        behind = _minor(server) - _minor(version)
        if not 0 <= behind <= most:
            way = "newer than" if behind < 0 else f"more than {most} minor version{'s' if most > 1 else ''} older than"
            raise errors.FailedPreconditionError(
                f"{name} {version} is {way} kube-apiserver {server}, and Kubernetes doesn't support that",
                hint="install programs of one version",
            )


def _minor(version: str) -> int:
    major, minor, *_ = version.split(".")
    return int(major) * 1000 + int(minor)


def memory(layout: Layout) -> str:
    """The file of what programs have said."""
    return os.path.join(layout.state_dir, "kubernetes.json")


def _read(layout: Layout) -> list[_Asked]:
    try:
        with open(memory(layout), "rb") as file:
            return msgspec.json.decode(file.read(), type=list[_Asked])
    except (OSError, *unreadable.JSON):
        return []


def _remember(layout: Layout, asked: list[_Asked]) -> None:
    # Where that can't be they are asked again.
    with contextlib.suppress(OSError, errors.NixletError):
        files.write_atomically(memory(layout), msgspec.json.encode(asked), mode=0o600)


def _mark(path: str) -> tuple[str, int, int, int, int]:
    real = os.path.realpath(path)
    status = os.stat(real)
    return real, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
