"""Where CRI's settings stand in containerd's configuration: version 2 has one plugin for them, later ones have two."""

from typing import Literal


def place(version: int, room: Literal["images", "runtime"], *path: str) -> tuple[str, ...]:
    """The keys on the way to one of them.

    Args:
        version: The configuration's.
        room: The plugin that has it in later versions.
        path: The keys below the plugin.
    """
    return ("plugins", "io.containerd.grpc.v1.cri" if version == 2 else f"io.containerd.cri.v1.{room}", *path)
