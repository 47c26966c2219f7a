"""`nixlet snapshotter` alone: beside a containerd that is not nixlet's, with nix-snapshotter's configuration."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import mounts
from nixlet.node import stand, standalone
from nixlet.rpc import server
from support import nodes, parts, storeimages

DIRECTORY = Path("/run/nixlet-test/4")


@contextlib.contextmanager
def running(argv: list[str], socket: Path, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A program that serves a socket, ended in order."""
    # A containerd takes the shim from its path; the one beside it is of its own version.
    environment = {**os.environ, "PATH": f"{Path(argv[0]).parent}:{os.environ['PATH']}"}
    with log.open("ab") as out, subprocess.Popen(argv, env=environment, stdout=out, stderr=out) as process:
        try:
            for _ in range(600):
                if server.is_served(str(socket)) or process.poll() is not None:
                    break
                time.sleep(0.05)
            assert process.poll() is None, log.read_text()
            yield process
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    yield tmp_path
    for pid in nodes.processes_below(DIRECTORY):
        os.kill(pid, 9)
    for entry in reversed([*mounts.below(str(tmp_path)), *mounts.below(str(DIRECTORY))]):
        mounts.unmount(entry.path)
    roots = Path("/nix/var/nix/gcroots/nixlet") / stand.roots_owner(f"{tmp_path}/snapshots")
    subprocess.run(["rm", "-rf", str(DIRECTORY), str(roots)], check=True)


def configuration(place: Path) -> Path:
    """A config.toml as nix-snapshotter has it."""
    file = place / "config.toml"
    file.write_text(
        f'address = "{DIRECTORY}/s/nix.sock"\nroot = "{place}/snapshots"\n'
        f'[image_service]\nenable = true\ncontainerd_address = "{DIRECTORY}/containerd.sock"\n'
    )
    return file


def snapshotter(place: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "nixlet", "snapshotter", "--config", str(configuration(place)), *arguments]


def containerd(place: Path, version: str) -> list[str]:
    """A containerd with a configuration that somebody else wrote: version 2, which all of them read."""
    file = place / "containerd.toml"
    file.write_text(
        f'version = 2\nroot = "{place}/root"\nstate = "{DIRECTORY}/state"\n'
        f'[grpc]\n  address = "{DIRECTORY}/containerd.sock"\n'
        f'[ttrpc]\n  address = "{DIRECTORY}/containerd.sock.ttrpc"\n'
        f'[plugins."io.containerd.internal.v1.opt"]\n  path = "{place}/opt"\n'
        f'[plugins."io.containerd.nri.v1.nri"]\n  disable = true\n'
        f'[proxy_plugins.nix]\n  type = "snapshot"\n  address = "{DIRECTORY}/s/nix.sock"\n'
        f'  [proxy_plugins.nix.exports]\n    root = "{place}/snapshots"\n'
    )
    socket = f"--address={DIRECTORY}/containerd.sock"
    return [
        str(parts.containerd(version)),
        f"--config={file}",
        socket,
        f"--root={place}/root",
        f"--state={DIRECTORY}/state",
    ]


@pytest.mark.parametrize("version", parts.CONTAINERD_PARAMETERS)
def test_any_containerd_runs_containers_through_it(
    place: Path, version: str, store_images: dict[int, storeimages.StoreImage]
) -> None:
    image = store_images[50]
    ctr = [str(parts.containerd(version).parent / "ctr"), "-a", f"{DIRECTORY}/containerd.sock"]
    run = [*ctr, "run", "--rm", "--snapshotter", "nix", "localhost/nix:1"]
    load = [sys.executable, "-m", "nixlet", "image", "load", "--address", f"{DIRECTORY}/containerd.sock"]
    load += ["--namespace", "default", "--ref", "localhost/nix:1", str(image.archive)]
    nix_socket, socket, log = DIRECTORY / "s" / "nix.sock", DIRECTORY / "containerd.sock", place / "log"
    with running(snapshotter(place), nix_socket, log), running(containerd(place, version), socket, log):
        done = subprocess.run(load, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        listed = subprocess.run([*run, "a", "/bin/ls", "/nix/store"], capture_output=True, text=True, check=True).stdout
        assert sorted(listed.split()) == sorted(path.name for path in image.paths)
        assert len([entry for entry in mounts.below(f"{place}/snapshots") if "/views/" in entry.path]) == 1
    assert mounts.below(str(place)) == []
    # SIGTERM removed nothing: the same again after a restart.
    with running(snapshotter(place), nix_socket, log), running(containerd(place, version), socket, log):
        shown = subprocess.run([*run, "b", "/bin/cat", image.link], capture_output=True, text=True, check=True).stdout
        assert shown == "a plain file\n"


def test_the_image_service_serves_at_once_and_finds_containerd_later(place: Path, hello: str) -> None:
    crictl = [str(parts.tool("crictl")), "--image-endpoint", f"unix://{DIRECTORY}/s/nix.sock", "--timeout", "20s"]
    crictl += ["--runtime-endpoint", f"unix://{DIRECTORY}/containerd.sock"]
    with running(snapshotter(place), DIRECTORY / "s" / "nix.sock", place / "log"):
        early = subprocess.run([*crictl, "pull", hello], capture_output=True, text=True, check=False)
        assert early.returncode != 0
        assert f"containerd at {DIRECTORY}/containerd.sock can't be reached" in early.stderr
        with running(containerd(place, "1.6.20"), DIRECTORY / "containerd.sock", place / "log"):
            subprocess.run([*crictl, "pull", hello], capture_output=True, text=True, check=True)
            images = json.loads(
                subprocess.run([*crictl, "images", "-o", "json"], capture_output=True, check=True).stdout
            )
            assert f"{hello}:latest" in [name for image in images["images"] for name in image["repoTags"]]


def test_a_second_one_names_the_first(place: Path) -> None:
    with running(snapshotter(place), DIRECTORY / "s" / "nix.sock", place / "log") as first:
        second = subprocess.run(snapshotter(place), capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 125
        assert f"the snapshotter's root {place}/snapshots is in use by process {first.pid}" in second.stderr
        other = subprocess.run(
            snapshotter(place, "--root", f"{place}/other"), capture_output=True, text=True, timeout=60, check=False
        )
        assert f"another process serves the socket {DIRECTORY}/s/nix.sock" in other.stderr
        assert server.is_served(f"{DIRECTORY}/s/nix.sock")


def test_a_root_of_the_go_program_is_left_alone(place: Path) -> None:
    (place / "snapshots").mkdir()
    (place / "snapshots" / "metadata.db").write_bytes(b"theirs")
    done = subprocess.run(snapshotter(place), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 125
    assert "belongs to the Go nix-snapshotter" in done.stderr
    assert os.listdir(place / "snapshots") == ["metadata.db"]


def test_settings(tmp_path: Path, place: Path) -> None:
    settings = standalone.read_settings(str(configuration(place)), {"root": "/elsewhere", "address": None})
    # The command line wins over the file.
    assert (settings.root, settings.address) == ("/elsewhere", f"{DIRECTORY}/s/nix.sock")
    assert settings.image_service.containerd_address == f"{DIRECTORY}/containerd.sock"
    for text, sentence in (
        ("adress = 1", "unknown field `adress`"),
        ("[image_service]\nenabled = true", r"unknown field `enabled` - at `\$.image_service`"),
        ("root = 5", r"Expected `str`, got `int` - at `\$.root`"),
        ("root = [", "is no TOML: Invalid value"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(errors.UsageError, match=sentence):
            standalone.read_settings(str(tmp_path / "bad.toml"), {})
    with pytest.raises(errors.UsageError, match="does not exist"):
        standalone.read_settings(str(tmp_path / "missing.toml"), {})
    assert standalone.read_settings(None, {}).address == "/run/nix-snapshotter/nix-snapshotter.sock"


def test_an_external_builder_brings_missing_paths(place: Path, archives: Path) -> None:
    """The program is called with a link's name and a store path, and makes the path valid."""
    image = storeimages.make(archives, 4)
    calls = place / "calls"
    builder = place / "builder"
    builder.write_text(f'#!/bin/sh\necho "$2" >>{calls}\nexec nix-store --add-root "$1" --realise "$2"\n')
    builder.chmod(0o755)
    configuration(place)
    with (place / "config.toml").open("r+") as file:
        text = file.read()
        file.seek(0)
        file.write(f'external_builder = "{builder}"\n{text}')
    argv = [sys.executable, "-m", "nixlet", "snapshotter", "--config", str(place / "config.toml")]
    crictl = [str(parts.tool("crictl")), "--image-endpoint", f"unix://{DIRECTORY}/s/nix.sock"]
    with (
        running(argv, DIRECTORY / "s" / "nix.sock", place / "log"),
        running(containerd(place, "1.6.20"), DIRECTORY / "containerd.sock", place / "log"),
    ):
        subprocess.run([*crictl, "pull", image.reference], capture_output=True, check=True)
        missing = f"nix:0/nix/store/{'0' * 32}-nowhere.tar"
        done = subprocess.run([*crictl, "pull", missing], capture_output=True, text=True, check=False)
        assert done.returncode != 0
    assert calls.read_text() == f"{missing.removeprefix('nix:0')}\n"
