"""The image of the cluster's DNS server, made of the program that the machine has, on a real node."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.containerd import cri, imagestore
from nixlet.images import loader
from nixlet.node.images import coredns
from nixlet.rpc import channel as channels
from nixlet.store import policy, realiser
from nixlet.store.daemon import client as nix
from support import nixstore, nodes, parts


@contextlib.asynccontextmanager
async def making(node: nodes.Node, directory: Path) -> AsyncIterator[tuple[coredns.Maker, imagestore.ImageStore]]:
    store = nix.DaemonStore(nix.DaemonSettings.from_environment(os.environ))
    address = str(node.containerd_socket)
    async with channels.connect(address) as channel:
        containerd = imagestore.ImageStore(channel, address)
        loads = loader.Loader(containerd, "nix", realiser.Realiser(store, policy.Policy()))
        yield coredns.Maker(store, loads, containerd, cri.ImageClient(channel, address), str(directory)), containerd


async def pinned(containerd: imagestore.ImageStore, name: str) -> bool:
    record = await containerd.image(name)
    assert record is not None
    return imagestore.PINNED.items() <= record.labels.items()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    copied = tmp_path / "bin" / "coredns"
    copied.parent.mkdir()
    shutil.copy(parts.directories()["coredns"] / "coredns", copied)
    return copied


async def test_a_static_program_is_an_image_of_one_store_path(
    any_node: nodes.Node, program: Path, tmp_path: Path
) -> None:
    async with making(any_node, tmp_path) as (maker, containerd):
        name = await maker.image_of(str(program))
        assert name.startswith("localhost/nixlet/coredns:")
        assert any_node.ok("run", "--rm", "--network", "none", name, "-version").startswith("CoreDNS-1.15.0\n")
        plugins = any_node.ok("run", "--rm", "--network", "none", name, "-plugins")
        assert {
            "cache",
            "errors",
            "forward",
            "health",
            "kubernetes",
            "loadbalance",
            "loop",
            "prometheus",
            "ready",
        } <= set(plugins.split())
        assert list(tmp_path.glob(".coredns-*")) == [], "nothing stays but the image"
        # What is known isn't made again, by way of a link either.
        link = tmp_path / "link"
        link.symlink_to(program)
        before = await containerd.image(name)
        assert await maker.image_of(str(link)) == name
        assert await containerd.image(name) == before
        assert await pinned(containerd, name)
        # Another program is another image; the first one may be collected now.
        os.utime(program, (1, 1))
        other = await maker.image_of(str(program))
        assert other != name
        assert await pinned(containerd, other)
        assert not await pinned(containerd, name)


async def test_a_program_of_the_store_comes_with_its_closure(
    any_node: nodes.Node, program: Path, tmp_path: Path
) -> None:
    adding = nixstore.Import()
    needed = adding.add("needed", nixstore.nar_file(b"needed\n"))
    inside = nixstore.nar_directory({"coredns": nixstore.nar_file(program.read_bytes(), executable=True)})
    package = adding.add(
        "coredns-1.15.0", nixstore.nar_directory({"bin": inside, "needed": nixstore.nar_link(needed)}), [needed]
    )
    adding.run(os.environ)
    profile = tmp_path / "profile"
    profile.symlink_to(package)
    async with making(any_node, tmp_path) as (maker, _):
        name = await maker.image_of(str(profile / "bin" / "coredns"))
        assert any_node.ok("run", "--rm", "--network", "none", name, "-version").startswith("CoreDNS-1.15.0\n")
        rooted = subprocess.run(
            ["nix-store", "--gc", "--print-live"], capture_output=True, text=True, check=True
        ).stdout
        assert {package, needed} <= set(rooted.split())


async def test_what_cannot_be_alone_in_an_image_is_refused(any_node: nodes.Node, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    async with making(any_node, tmp_path) as (maker, _):
        for path in ("/bin/ls", str(script)):
            with pytest.raises(errors.UnsupportedError, match="no statically linked program"):
                await maker.image_of(path)
        with pytest.raises(errors.FailedPreconditionError, match="No such file"):
            await maker.image_of(str(tmp_path / "none"))
