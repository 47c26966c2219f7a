"""The real programs that tests run against: Debian's, and those that scripts/parts installed."""

import functools
import os
import subprocess
from pathlib import Path

import pytest


@functools.cache
def directories() -> dict[str, Path]:
    """Family to directory; scripts/test hands them over, and a bare pytest asks for them itself."""
    listed = os.environ.get("NIXLET_PARTS")
    if listed is None:
        script = Path(__file__).parents[2] / "scripts" / "parts"
        listed = subprocess.run([script], stdout=subprocess.PIPE, text=True, check=True).stdout
    return {family: Path(directory) for family, directory in (line.split(" ", 1) for line in listed.splitlines())}


#: The containerds that everything must work with, by the version that they say.
CONTAINERDS = ("1.6.20", "1.7.35", "2.2.9", "2.4.2")

#: The same as parameters of tests. A quick run has the newest alone: the tests of single verbs run with the oldest, Debian's.
CONTAINERD_PARAMETERS = [
    pytest.param(version, marks=[] if version == CONTAINERDS[-1] else pytest.mark.slow) for version in CONTAINERDS
]


def containerd(version: str) -> Path:
    """The containerd program of a version."""
    if version.startswith("1.6"):
        return Path("/usr/bin/containerd")
    return directories()[f"containerd-{version.rpartition('.')[0]}"] / "containerd"


def tool(name: str) -> Path:
    """A program of the family "tools"."""
    return directories()["tools"] / name


def crictl(image_socket: Path, runtime_socket: Path | None = None) -> list[str]:
    """The beginning of a crictl command line.

    crictl asks a service whether it is well before it does what it is for, and takes 2 s without an answer for an error: too little
    for a containerd that has just started on a machine with other things to do.
    """
    ends = ["--image-endpoint", f"unix://{image_socket}"]
    if runtime_socket is not None:
        ends += ["--runtime-endpoint", f"unix://{runtime_socket}"]
    return [str(tool("crictl")), *ends, "--timeout", "100s"]


def kubernetes() -> Path:
    """The directory of Kubernetes' programs."""
    return directories()["kubernetes-1.36"]
