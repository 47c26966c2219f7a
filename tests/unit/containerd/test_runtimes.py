"""Runtimes are found by k3s's names, where k3s looks."""

from pathlib import Path

import pytest

from nixlet.containerd import runtimes


def install(directory: Path, *names: str, mode: int = 0o755) -> Path:
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(mode)
    return directory


@pytest.mark.parametrize(
    ("name", "kind", "program"),
    [
        ("crun", "io.containerd.runc.v2", "crun"),
        ("nvidia", "io.containerd.runc.v2", "nvidia-container-runtime"),
        ("nvidia-experimental", "io.containerd.runc.v2", "nvidia-container-runtime-experimental"),
        ("nvidia-cdi", "io.containerd.runc.v2", "nvidia-container-runtime.cdi"),
        ("lunatic", "io.containerd.lunatic.v1", "containerd-shim-lunatic-v1"),
        ("slight", "io.containerd.slight.v1", "containerd-shim-slight-v1"),
        ("wws", "io.containerd.wws.v1", "containerd-shim-wws-v1"),
        ("wasmedge", "io.containerd.wasmedge.v1", "containerd-shim-wasmedge-v1"),
        ("wasmer", "io.containerd.wasmer.v1", "containerd-shim-wasmer-v1"),
        ("wasmtime", "io.containerd.wasmtime.v1", "containerd-shim-wasmtime-v1"),
        ("spin", "io.containerd.spin.v2", "containerd-shim-spin-v2"),
    ],
)
def test_what_is_installed_is_found(tmp_path: Path, name: str, kind: str, program: str) -> None:
    directory = install(tmp_path / "bin", program)
    found = runtimes.discover(str(directory), ())
    assert found == {name: runtimes.Runtime(kind, f"{directory}/{program}")}
    assert found[name].is_shim == (kind != "io.containerd.runc.v2")


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    install(tmp_path / "bin", "crun", mode=0o644)
    (tmp_path / "bin" / "containerd-shim-spin-v2").mkdir()
    assert runtimes.discover(f"{tmp_path}/bin:{tmp_path}/missing", ()) == {}


def test_the_installers_directories_come_first(tmp_path: Path) -> None:
    known, path = install(tmp_path / "toolkit", "crun"), install(tmp_path / "bin", "crun")
    other = install(tmp_path / "other", "crun")
    assert runtimes.discover(f"{path}:{other}", [str(known)])["crun"].program == f"{known}/crun"
    assert runtimes.discover(f"{path}:{other}", ())["crun"].program == f"{path}/crun"
    assert runtimes.DIRECTORIES == ("/usr/local/nvidia/toolkit", "/opt/kwasm/bin")


@pytest.mark.parametrize("path", ["", ".", "bin", ":bin"])
def test_where_we_stand_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    install(tmp_path / "bin", "crun")
    install(tmp_path, "crun")
    monkeypatch.chdir(tmp_path)
    assert runtimes.discover(path, ()) == {}
