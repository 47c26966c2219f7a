"""What a pull leaves behind, and what CRI knows when it is done."""

import asyncio
import gzip
import json
import shutil
import subprocess
from pathlib import Path

from nixlet.containerd import cri
from nixlet.rpc import channel as channels
from support import nodes, storeimages


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
        subprocess.run(["nix-store", "--delete", path], check=True, capture_output=True)
