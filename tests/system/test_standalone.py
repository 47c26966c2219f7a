"""`nixlet snapshotter` alone: beside a containerd that is not nixlet's, with nix-snapshotter's configuration."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import mounts, unixsocket
from nixlet.node.lifecycle import standalone
from support import alone, parts, storeimages

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> Iterator[alone.Alone]:
    with alone.cleaned_up(4, tmp_path) as made:
        yield made


@pytest.mark.parametrize("version", parts.CONTAINERD_PARAMETERS)
@pytest.mark.parametrize("strategy", ["view", "bind"])
def test_any_containerd_runs_containers_through_it(
    place: alone.Alone, version: str, strategy: str, store_images: dict[int, storeimages.StoreImage]
) -> None:
    image = store_images[50]
    run = ["run", "--rm", "--snapshotter", "nix", "localhost/nix:1"]
    options = ("--strategy", strategy)
    with place.serving(*options), place.containerd(version) as ctr:
        place.load(image, "localhost/nix:1")
        look = [*ctr, *run, "a", "/bin/ls", "/nix/store"]
        done = subprocess.run(look, capture_output=True, text=True, check=False)
        if (version, strategy) == ("1.6.20", "bind"):
            assert done.returncode != 0
            assert "is version 1.6.20~ds1, which can't bind store paths into containers" in done.stderr
            return
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split()) == sorted(path.name for path in image.paths)
        views = [entry for entry in mounts.below(str(place.root)) if "/views/" in entry.path]
        assert len(views) == (1 if strategy == "view" else 0)
    assert mounts.below(str(place.directory)) == []
    # SIGTERM removed nothing: the same again after a restart.
    with place.serving(*options), place.containerd(version) as ctr:
        argv = [*ctr, *run, "b", "/bin/cat", image.link]
        assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "a plain file\n"


def test_the_image_service_serves_at_once_and_finds_containerd_later(place: alone.Alone, hello: str) -> None:
    crictl = parts.crictl(place.socket, place.containerd_socket)
    with place.serving():
        early = subprocess.run([*crictl, "pull", hello], capture_output=True, text=True, check=False)
        assert early.returncode != 0
        assert f"containerd at {place.containerd_socket} can't be reached" in early.stderr
        with place.containerd("1.6.20"):
            subprocess.run([*crictl, "pull", hello], capture_output=True, text=True, check=True)
            images = json.loads(
                subprocess.run([*crictl, "images", "-o", "json"], capture_output=True, check=True).stdout
            )
            assert f"{hello}:latest" in [name for image in images["images"] for name in image["repoTags"]]


def refused(place: alone.Alone, *arguments: str) -> str:
    """What a snapshotter says that can't start."""
    argv = place.snapshotter(*arguments)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 125
    return done.stderr


def test_one_that_is_not_needed_any_more_is_taken_away(
    place: alone.Alone, store_images: dict[int, storeimages.StoreImage]
) -> None:
    argv = [sys.executable, "-m", "nixlet", "uninstall", "--snapshotter-root", str(place.root)]

    def uninstall(*more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*argv, *more], capture_output=True, text=True, check=False)

    assert "there is no snapshotter at" in uninstall("--yes").stderr
    with place.serving(), place.containerd("1.6.20"):
        place.load(store_images[50], "localhost/nix:1")
        assert "is in use by process" in uninstall("--yes").stderr
    assert os.listdir(place.gc_roots)
    planned = uninstall()
    assert planned.returncode == 0
    assert str(place.gc_roots) in planned.stdout
    assert place.root.exists()
    assert uninstall("--yes").returncode == 0
    assert not place.gc_roots.exists()
    assert not place.root.exists()
    assert all(os.path.lexists(str(path)) for path in store_images[50].paths)


def test_a_second_one_names_the_first(place: alone.Alone) -> None:
    with place.serving() as first:
        assert f"the snapshotter's root {place.root} is in use by process {first.pid}" in refused(place)
        other = refused(place, "--root", f"{place.directory}/other")
        assert f"another process serves the socket {place.socket}" in other
        assert unixsocket.is_served(str(place.socket))


def test_a_root_of_the_go_program_is_left_alone(place: alone.Alone) -> None:
    place.root.mkdir()
    (place.root / "metadata.db").write_bytes(b"theirs")
    assert "belongs to the Go nix-snapshotter" in refused(place)
    assert os.listdir(place.root) == ["metadata.db"]


def test_a_containerd_that_would_not_see_the_views_is_told(place: alone.Alone) -> None:
    with place.containerd("1.6.20"):
        argv = ["unshare", "--mount", *place.snapshotter()]
        with place.log.open("ab") as log, subprocess.Popen(argv, stdout=log, stderr=log) as elsewhere:
            try:
                for _ in range(600):
                    if "another mount namespace" in place.log.read_text() or elsewhere.poll() is not None:
                        break
                    time.sleep(0.05)
            finally:
                elsewhere.terminate()
    assert "is in another mount namespace than nixlet and won't see its views" in place.log.read_text()


def test_no_call_fails_while_a_service_manager_restarts_it(place: alone.Alone) -> None:
    """containerd goes on calling while the snapshotter comes and goes five times; the manager keeps the socket."""
    with (
        contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager,
        place.containerd("2.4.2") as ctr,
    ):
        manager.bind(f"{place.run}/notify")
        manager.settimeout(20)
        told = {"NOTIFY_SOCKET": f"{place.run}/notify"}
        with place.serving(environment=told):
            # The manager may have another one from before.
            assert manager.recv(200) == b"FDSTOREREMOVE=1\nFDNAME=nixlet"
            message, (kept,), *_ = socket.recv_fds(manager, 200, 1)
            assert message == b"FDSTORE=1\nFDNAME=nixlet"
            assert manager.recv(200) == b"READY=1"
        assert manager.recv(200) == b"STOPPING=1"
        listening = socket.socket(fileno=kept)
        with listening, (place.directory / "calls").open("w") as log:
            # containerd's own client makes them, through containerd, one after the other.
            calls = f"n=0; while [ ! -e {place.run}/end ]; do n=$((n+1)); {' '.join(ctr)} snapshots --snapshotter nix"
            calls += ' prepare "key-$n" >/dev/null && echo "made $n"; done; true'
            with subprocess.Popen(["sh", "-c", calls], stdout=log, stderr=log) as calling:
                restarts = []
                stopped = time.monotonic()
                for _ in range(5):
                    with place.serving(environment=told, listening=listening):
                        while manager.recv(200) != b"READY=1":
                            pass
                        restarts.append(time.monotonic() - stopped)
                        time.sleep(0.3)
                    assert manager.recv(200) == b"STOPPING=1"
                    stopped = time.monotonic()
                (place.run / "end").touch()
                with place.serving(listening=listening):
                    assert calling.wait(30) == 0, (place.directory / "calls").read_text()[-2000:]
        # A call that failed would have said why; containerd itself only warns of the old cgroups.
        lines = [line for line in (place.directory / "calls").read_text().splitlines() if "DEPRECATION" not in line]
    made = [line for line in lines if line.startswith("made ")]
    failed = [line for line in lines if not line.startswith("made ")]
    assert len(made) > 20
    # containerd gives a new connection a second for its first answer: on a machine that takes longer for a start, a call may
    # fail for that reason alone.
    assert all("server preface" in line for line in failed)
    if max(restarts[1:]) < 0.7:
        assert failed == []
        assert made == [f"made {number + 1}" for number in range(len(made))]


def test_settings(tmp_path: Path, place: alone.Alone) -> None:
    place.snapshotter()
    settings = standalone.read_settings(f"{place.directory}/config.toml", {"root": "/elsewhere", "address": None})
    # The command line wins over the file.
    assert (settings.root, settings.address) == ("/elsewhere", str(place.socket))
    assert settings.image_service.containerd_address == str(place.containerd_socket)
    assert settings.strategy == "auto"
    for text, sentence in (
        ("adress = 1", "unknown field `adress`"),
        ("[image_service]\nenabled = true", r"unknown field `enabled` - at `\$.image_service`"),
        ("root = 5", r"Expected `str`, got `int` - at `\$.root`"),
        ("root = [", "is no TOML: Invalid value"),
        ("strategy = 'best'", r"Invalid enum value 'best' - at `\$.strategy`"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(errors.UsageError, match=sentence):
            standalone.read_settings(str(tmp_path / "bad.toml"), {})
    with pytest.raises(errors.UsageError, match="does not exist"):
        standalone.read_settings(str(tmp_path / "missing.toml"), {})
    assert standalone.read_settings(None, {}).address == "/run/nix-snapshotter/nix-snapshotter.sock"


def crictl_pull(place: alone.Alone, reference: str) -> "subprocess.CompletedProcess[str]":
    argv = [*parts.crictl(place.socket), "pull", reference]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_an_external_builder_brings_missing_paths(place: alone.Alone, archives: Path) -> None:
    """The program is called with a link's name and a store path, and makes the path valid."""
    image = storeimages.make(archives, 4)
    calls = place.directory / "calls"
    builder = place.directory / "builder"
    builder.write_text(f'#!/bin/sh\necho "$2" >>{calls}\nexec nix-store --add-root "$1" --realise "$2"\n')
    builder.chmod(0o755)
    with place.serving(settings=f'external_builder = "{builder}"\n'), place.containerd("1.6.20"):
        assert crictl_pull(place, image.reference).returncode == 0
        missing = f"nix:0/nix/store/{'0' * 32}-nowhere.tar"
        assert crictl_pull(place, missing).returncode != 0
    assert calls.read_text() == f"{missing.removeprefix('nix:0')}\n"


def unsigned_path() -> str:
    """A store path that came in by an import: nobody signed it, its name is not that of its content, and it wasn't built here."""
    text = (
        f'derivation {{ name = "unsigned"; system = builtins.currentSystem; builder = "/bin/sh"; x = "{time.time()}";'
    )
    text += ' args = [ "-c" "echo x >$out" ]; }'
    environment = {**os.environ, "NIX_CONFIG": "build-users-group =\nsandbox = false\nsubstituters ="}

    def nix(*argv: str, given: bytes = b"") -> bytes:
        return subprocess.run(argv, env=environment, input=given, capture_output=True, check=True).stdout

    path = nix("nix-build", "--no-out-link", "-E", text).decode().strip()
    exported = nix("nix-store", "--export", path)
    nix("nix-store", "--delete", path)
    nix("nix-store", "--import", given=exported)
    return path


def test_paths_that_nobody_vouches_for_can_be_refused(place: alone.Alone) -> None:
    path = unsigned_path()
    (place.directory / "closure").write_text(f"{path}\n")
    archive = f"/tmp/{place.directory.name}-unsigned.tar"
    (place.directory / "config").write_text("{}")
    build = [sys.executable, "-m", "nixlet", "image", "build", "--config", f"{place.directory}/config"]
    build += ["--closure", f"{place.directory}/closure", archive]
    try:
        subprocess.run(build, capture_output=True, check=True)
        with place.serving("--unsigned-paths", "deny"), place.containerd("1.6.20"):
            done = crictl_pull(place, f"nix:0{archive}")
            assert done.returncode != 0
            assert f"the store path {path} is unsigned, and unsigned_paths is set to deny" in done.stderr
            assert f"nix store sign {path}" in done.stderr
            assert not place.gc_roots.exists() or os.listdir(place.gc_roots) == []
            # An archive in the store is a store path, too: it is not even opened.
            done = crictl_pull(place, f"nix:0{path}")
            assert f"the store path {path} is unsigned, and unsigned_paths is set to deny" in done.stderr
        with place.serving(), place.containerd("1.6.20"):
            assert crictl_pull(place, f"nix:0{archive}").returncode == 0
    finally:
        Path(archive).unlink(missing_ok=True)
