"""Which machine an image is for: Go's names for processors, and what runs on what."""

import os
import sys

from nixlet.images import model

#: ``uname -m`` to Go's architecture and variant.
_MACHINES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "i386": ("386", ""),
    "i686": ("386", ""),
    "loongarch64": ("loong64", ""),
    "mips": ("mips" if sys.byteorder == "big" else "mipsle", ""),
    "mips64": ("mips64" if sys.byteorder == "big" else "mips64le", ""),
}

#: The variant that is meant when none is said, and those that a variant's machine runs, the best first.
_ASSUMED = {"amd64": "v1", "arm64": "v8", "arm": "v7"}
_ARM_VARIANTS = ("v8", "v7", "v6", "v5")


def host_platform(machine: str | None = None) -> model.Platform:
    """This machine's platform, or that of a ``uname -m``; unknown machines keep their own name (riscv64, s390x, …)."""
    name = machine or os.uname().machine
    architecture, variant = _MACHINES.get(name, (name, ""))
    return model.Platform(architecture, "linux", variant)


def rank(image: model.Platform, machine: model.Platform) -> int | None:
    """How well a machine runs an image: 0 is best, None is not at all."""
    if (image.os, image.architecture) != (machine.os, machine.architecture):
        return None
    offered, own = _variant(image), _variant(machine)
    if offered == own:
        return 0
    if image.architecture != "arm" or own not in _ARM_VARIANTS:
        return None
    runs = _ARM_VARIANTS[_ARM_VARIANTS.index(own) :]
    return runs.index(offered) if offered in runs else None


def _variant(platform: model.Platform) -> str:
    return platform.variant or _ASSUMED.get(platform.architecture, "")
