"""What a pull leaves behind, and what CRI knows when it is done."""

import asyncio
import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from nixlet.containerd import cri
from nixlet.images import archive, model, platforms
from nixlet.rpc import channel as channels
from support import image_archives, nixstore, nodes, storeimages


def test_a_pull_answers_when_cri_knows_the_name(node: nodes.Node, archives: Path, ordinary: Path) -> None:
    """Also where it knows the image by other names already."""
    names = [archives / f"copy{number}.tar" for number in range(8)]
    for name in names:
        shutil.copy(ordinary, name)

    async def pull_all() -> list[bool]:
        known = []
        async with (
            channels.connect(str(node.node_socket)) as ours,
            channels.connect(str(node.containerd_socket)) as its,
        ):
            pulling, asked = cri.ImageClient(ours, "the node"), cri.ImageClient(its, "containerd")
            for name in names:
                image_id = await pulling.pull(f"nix:0{name}")
                shown = await asked.status(f"nix:0{name}:latest")
                known.append(shown is not None and shown.id == image_id)
        return known

    assert asyncio.run(pull_all()) == [True] * len(names)
    node.crictl("rmi", f"nix:0{names[0]}")
    for name in names:
        name.unlink()


def test_a_verbose_status_has_its_info(node: nodes.Node, store_images: dict[int, storeimages.StoreImage]) -> None:
    image = store_images[1].reference
    node.crictl("pull", image)
    shown = json.loads(node.crictl("inspecti", image))
    assert shown["status"]["repoTags"] == [f"{image}:latest"]
    assert shown["info"]["imageSpec"]["config"]["Cmd"] == ["/bin/sh"]
    node.crictl("rmi", image)


def test_a_name_of_an_image_for_several_machines(any_node: nodes.Node, tmp_path: Path) -> None:
    """Others can import an index under such a name: the image is the one for this machine."""
    own, blobs = image_archives.image([image_archives.tar({"own": b""})])
    foreign, more = image_archives.image([image_archives.tar({"foreign": b""})], architecture="s390x")
    entries = [
        image_archives.entry(foreign, platform={"os": "linux", "architecture": "s390x"}),
        image_archives.entry(own, platform={"os": "linux", "architecture": "amd64"}),
    ]
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": image_archives.index_json(*entries)}
    path = tmp_path / "several.tar"
    path.write_bytes(image_archives.tar({**files, **blobs, **more}))
    name = f"nix:0{path}:latest"
    any_node.ok("ctr", "images", "import", "--snapshotter", "nix", "--index-name", name, str(path))
    (listed,) = [line.split() for line in any_node.ok("ctr", "images", "ls").splitlines() if line.startswith(name)]
    assert listed[1] == f"{image_archives.OCI}.index.v1+json"
    shown = json.loads(any_node.crictl("inspecti", f"nix:0{path}"))["status"]
    assert shown["id"] == json.loads(own)["config"]["digest"]
    any_node.crictl("rmi", f"nix:0{path}")
    assert name not in any_node.ok("ctr", "images", "ls", "-q").split()


def test_a_record_whose_image_is_gone_can_be_removed(any_node: nodes.Node, archives: Path, ordinary: Path) -> None:
    """CRI doesn't show it, but it is in the way of those who look at containerd's records."""
    path = archives / "vanishing.tar"
    shutil.copy(ordinary, path)
    name = f"nix:0{path}:latest"
    any_node.crictl("pull", f"nix:0{path}")
    (listed,) = [line.split() for line in any_node.ok("ctr", "images", "ls").splitlines() if line.startswith(name)]
    any_node.ok("ctr", "content", "rm", listed[2])

    async def remove() -> None:
        async with channels.connect(str(any_node.node_socket)) as channel:
            await cri.ImageClient(channel, "the node").remove(f"nix:0{path}")

    asyncio.run(remove())
    assert name not in any_node.ok("ctr", "images", "ls", "-q").split()
    path.unlink()


@pytest.mark.slow
def test_an_image_that_others_unpacked_has_its_closure(node: nodes.Node, tmp_path: Path, archives: Path) -> None:
    """Whatever is there without it: a record alone, with layers that others unpacked, with layers that are gone."""
    image = storeimages.make(archives, 7, salt="unpacked")
    name = f"nix:0{image.archive}:latest"

    def lists() -> None:
        """A container sees the closure."""
        for wanted in (image.reference, "localhost/unpacked:1"):
            listed = node.ok("run", "--rm", "--pull", "never", wanted, "/bin/ls", "/nix/store").split()
            assert sorted(listed) == sorted(path.name for path in image.paths)

    with archive.open_archive(str(image.archive)) as source:
        found = source.image(platforms.host_platform())
    (layer,) = model.chain_ids([layer.diff_id for layer in found.layers])

    def unpack_anew() -> None:
        removal = ("ctr", "snapshots", "--snapshotter", "nix", "rm", layer)
        # The containers go behind the answer.
        nodes.until(lambda: node.run(*removal).returncode == 0, "no container needs the layer any more")

    for more in (["--snapshotter", "nix"], ["--no-unpack"]):
        node.ok("ctr", "images", "import", *more, str(image.archive))
        node.ok("ctr", "images", "tag", name, "localhost/unpacked:1")
        lists()
        unpack_anew()
        lists()
        # CRI's record of it may go by itself.
        node.run("ctr", "images", "rm", "--sync", name, "localhost/unpacked:1", found.manifest.config.digest)


def test_an_archive_in_the_store_is_expanded_once(
    any_node: nodes.Node, store_images: dict[int, storeimages.StoreImage], tmp_path: Path
) -> None:
    archive = tmp_path / "image.tar.gz"
    archive.write_bytes(gzip.compress(store_images[1].archive.read_bytes()))
    add = ["nix-store", "--add", str(archive)]
    path = subprocess.run(add, capture_output=True, text=True, check=True).stdout.strip()
    any_node.crictl("pull", f"nix:0{path}")
    # It begins as it did, but nobody can expand it.
    damaged = tmp_path / "damaged"
    damaged.write_bytes(archive.read_bytes()[:10])
    subprocess.run(["mount", "--bind", str(damaged), path], check=True)
    try:
        any_node.crictl("pull", f"nix:0{path}")
        assert any_node.ok("run", "--rm", "--pull", "always", f"nix:0{path}", "/bin/echo", "here") == "here\n"
        any_node.crictl("rmi", f"nix:0{path}")
        done = any_node.run("run", "--rm", f"nix:0{path}")
        assert b"ends too early" in done.stderr
    finally:
        subprocess.run(["umount", path], check=True)
        nixstore.delete(path)
