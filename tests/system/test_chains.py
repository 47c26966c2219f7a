"""Long and mixed chains of layers through containerd: Nix layers below, above and between ordinary ones."""

import os
from pathlib import Path

import pytest

from support import image_archives, nodes, storeimages

pytestmark = pytest.mark.slow

PREFIX = "containerd.io/snapshot"
CONFIG = {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]}


def nix_layer(image: storeimages.StoreImage) -> tuple[bytes, dict[str, str]]:
    """The links to busybox's programs, and the annotations that name the closure."""
    applets = os.listdir(f"{image.paths[0]}/bin")
    links = [image_archives.link(f"bin/{name}", f"{image.paths[0]}/bin/{name}") for name in applets]
    notes = {f"{PREFIX}/nix-layer": "true"}
    notes |= {f"{PREFIX}/nix-store-path.{number}": str(path) for number, path in enumerate(image.paths)}
    return image_archives.tar({}, links=links), notes


def ordinary(count: int) -> list[tuple[bytes, None]]:
    return [(image_archives.tar({f"layers/{number}": f"{number}\n".encode()}), None) for number in range(count)]


def run(node: nodes.Node, path: Path, layers: list[tuple[bytes, dict[str, str] | None]], script: str) -> list[str]:
    """What a script prints in a container of these layers, bottom first."""
    files = image_archives.oci(
        [data for data, _ in layers], name=None, annotations=[notes for _, notes in layers], config=CONFIG
    )
    path.write_bytes(image_archives.tar(files))
    try:
        return node.ok("run", "--rm", f"nix:0{path}", "/bin/sh", "-c", script).splitlines()
    finally:
        path.unlink()


@pytest.mark.parametrize(("below", "above"), [(0, 128), (100, 0)])
def test_a_nix_layer_in_a_long_chain(
    node: nodes.Node, below: int, above: int, archives: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    image = store_images[50]
    count = below + above
    layers = [*ordinary(count)[:below], nix_layer(image), *ordinary(count)[below:]]
    script = f"cat /layers/0 /layers/{count - 1}; cat {image.link}; ls /layers | busybox wc -l; ls /nix/store | busybox wc -l"
    script = script.replace("busybox", f"{image.paths[0]}/bin/busybox")
    assert run(node, archives / f"chain-{below}-{above}.tar", layers, script) == [
        "0",
        str(count - 1),
        "a plain file",
        str(count),
        str(len(image.paths)),
    ]


def test_edits_below_the_store_between_two_nix_layers(
    node: nodes.Node, archives: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    """An ordinary layer replaces, removes and adds below /nix/store; a Nix layer above shares a path with the one below."""
    lower = store_images[50]
    # A closure of busybox alone, which the lower one has as well.
    upper = store_images[1]
    packages = [str(path) for path in lower.paths if "-package-" in path.name]
    edits = image_archives.tar(
        {
            f"{packages[0][1:]}/share/number": b"replaced\n",
            f"{packages[1][1:]}/share/.wh.number": b"",
            f"{packages[2][1:]}/share/.wh..wh..opq": b"",
            f"{packages[2][1:]}/share/added": b"added\n",
            f"nix/store/.wh.{Path(packages[3]).name}": b"",
        }
    )
    script = (
        f"cat {packages[0]}/share/number; ls {packages[1]}/share; echo --; ls {packages[2]}/share;"
        f" ls -d {packages[3]} 2>&1 | busybox grep -c 'No such'; cat {packages[4]}/share/number;"
        # The container's own: written, renamed and linked below the store, and gone with it.
        f" cd {packages[5]}/share && echo own >own && busybox mv own renamed && busybox ln renamed linked && cat linked;"
        f" busybox mv number moved && cat moved && busybox ln moved again && busybox stat -c %h moved"
    ).replace("busybox", f"{lower.paths[0]}/bin/busybox")
    number = (Path(packages[4]) / "share" / "number").read_text().strip()
    own = (Path(packages[5]) / "share" / "number").read_text().strip()
    layers = [nix_layer(lower), (edits, None), nix_layer(upper)]
    assert run(node, archives / "edits.tar", layers, script) == [
        *("replaced", "--", "added", "1", number, "own", own, "2"),
    ]
    # The store is as it was.
    assert os.listdir(f"{packages[5]}/share") == ["number"]
    assert (Path(packages[0]) / "share" / "number").read_text() != "replaced\n"
    assert os.path.exists(packages[3])
