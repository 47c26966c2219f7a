"""Asking a containerd about itself: what real ones don't say on command comes from small scripts."""

from pathlib import Path

import pytest

from nixlet import errors
from nixlet.containerd import config

SAYS = "containerd github.com/containerd/containerd v1.7.35 c0ffee"


def program(directory: Path, *, version: str = f"echo '{SAYS}'", default: str = "echo version = 2") -> str:
    path = directory / "containerd"
    path.write_text(f'#!/bin/sh\ncase "$*" in\n--version) {version};;\n"config default") {default};;\nesac\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        (SAYS, "1.7.35"),
        ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u2", "1.6.20"),
        ("containerd github.com/containerd/containerd/v2 2.4.2+unknown ", "2.4.2"),
        ("containerd containerd.io v2.3.0-rc.1 0123", "2.3.0-rc.1"),
        ("a build without a number", "a build without a number"),
    ],
)
async def test_versions(tmp_path: Path, printed: str, version: str) -> None:
    path = program(tmp_path, version=f"echo '{printed}'")
    assert await config.ask(path) == config.ContainerdProgram(path, version, 2)


@pytest.mark.parametrize(
    ("default", "version"),
    [
        ("echo version = 3", 3),
        ("printf '# a comment\\nversion = 4\\n'", 4),
        ("printf 'disabled_plugins = []\\nversion = 2\\n'", 2),
    ],
)
async def test_configuration_versions(tmp_path: Path, default: str, version: int) -> None:
    assert (await config.ask(program(tmp_path, default=default))).config_version == version


@pytest.mark.parametrize(("default", "version"), [("echo version = 5", 5), ("echo version = 1", 1)])
async def test_a_configuration_that_nixlet_cannot_render(tmp_path: Path, default: str, version: int) -> None:
    path = program(tmp_path, default=default)
    with pytest.raises(errors.UnsupportedError) as caught:
        await config.ask(path)
    assert caught.value.message == (
        f"{path} (1.7.35) speaks configuration version {version}, and nixlet renders 2, 3, 4"
    )
    assert caught.value.hint == "use containerd 1.6 to 2.4"


@pytest.mark.parametrize("default", ["echo '[version]'", "true"])
async def test_a_program_that_is_no_containerd(tmp_path: Path, default: str) -> None:
    path = program(tmp_path, version="printf 'other 1\nCopyright\n'", default=default)
    with pytest.raises(errors.UnsupportedError) as caught:
        await config.ask(path)
    assert caught.value.message == f"{path} (other 1) is no containerd: it names no version of its configuration"
    assert caught.value.hint == "name the containerd program: --containerd"


async def test_a_program_that_fails(tmp_path: Path) -> None:
    path = program(tmp_path, default="echo no such command >&2; exit 3")
    with pytest.raises(errors.CommandFailedError, match=r"^containerd ended with status 3: no such command$"):
        await config.ask(path)


async def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.UnavailableError, match="is not installed or not executable"):
        await config.ask(str(tmp_path / "containerd"))
