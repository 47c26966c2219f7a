"""Loading an image whose store paths are all present: `nixlet image load` and `nix2container load`."""

import os
import subprocess
from pathlib import Path
from typing import Any

import commands
import measure
from support import nodes, parts, storeimages

#: containerd's namespaces that the image is loaded into: each tool's own, since content that one loaded would be there for the other.
_NIXLET, _NIX2CONTAINER = "k8s.io", "nix2container"


def rows(node: nodes.Node, image: storeimages.StoreImage, containerd: Path, rounds: int) -> dict[str, Any]:
    """What the whole command takes, in milliseconds, where the image is not there ("cold"), and where it is."""
    nixlet = commands.nixlet(node, str(image.archive))
    argv = [str(parts.tool("nix2container")), "--address", str(node.containerd_socket), "--namespace", _NIX2CONTAINER]
    other = commands.Tool("nix2container", argv, os.environ, "")
    ctr = [str(containerd.parent / "ctr"), "-a", str(node.containerd_socket)]

    def images(namespace: str) -> list[str]:
        listed = subprocess.run(
            [*ctr, "-n", namespace, "images", "ls", "-q"], capture_output=True, text=True, check=True
        )
        return listed.stdout.split()

    before = {namespace: set(images(namespace)) for namespace in (_NIXLET, _NIX2CONTAINER)}

    def forget(namespace: str) -> None:
        for name in images(namespace):
            if name not in before[namespace]:
                subprocess.run([*ctr, "-n", namespace, "images", "rm", "--sync", name], capture_output=True, check=True)

    def nixlet_load() -> float:
        return nixlet.ran("image", "load", str(image.archive)).ms

    def other_load() -> float:
        return other.ran("load", str(image.archive)).ms

    def cold_nixlet() -> float:
        taken = nixlet_load()
        forget(_NIXLET)
        return taken

    def cold_other() -> float:
        taken = other_load()
        forget(_NIX2CONTAINER)
        return taken

    warm_up = min(rounds - 1, 1)
    cold = measure.rounds({"nixlet": cold_nixlet, "nix2container": cold_other}, rounds, warm_up=warm_up)
    there = measure.rounds({"nixlet": nixlet_load, "nix2container": other_load}, rounds, warm_up=1)
    for namespace in before:
        forget(namespace)
    return {
        what: {name: measure.row(values) for name, values in samples.items()}
        for what, samples in (("cold", cold), ("it is there already", there))
    }
