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

#: Other names of processors, with the variant that they mean; None leaves the variant that is said.
_ALIASES = {"x86_64": ("amd64", None), "x86-64": ("amd64", None), "aarch64": ("arm64", None), "i386": ("386", "")} | {
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
}

#: Variants by other names; "" is the one that is meant when none is said.
_VARIANTS = {
    "amd64": {"v1": ""},
    "arm64": {"8": "", "v8": "", "v8.0": "", "9": "v9", "9.0": "v9", "v9.0": "v9"},
    "arm": {"": "v7", "5": "v5", "6": "v6", "7": "v7", "8": "v8"},
}
_ARM_VARIANTS = ("v8", "v7", "v6", "v5")


def host_platform(machine: str | None = None) -> model.Platform:
    """This machine's platform, or that of a ``uname -m``; unknown machines keep their own name (riscv64, s390x, …)."""
    name = machine or os.uname().machine
    architecture, variant = _MACHINES.get(name, (name, ""))
    return model.Platform(architecture, "linux", variant)


def rank(image: model.Platform, machine: model.Platform) -> int | None:
    """How well a machine runs an image: 0 is best, None is not at all. As containerd's clients choose by default."""
    offered = _normal(image)
    runs = _runs(_normal(machine))
    return runs.index(offered) if offered in runs else None


def rank_alone(image: model.Platform, machine: model.Platform) -> int | None:
    """The same for an image that has one form only: nobody had to choose, so what it leaves open is no reason to refuse it.

    It may say nothing of the processor, or name a variant that isn't known of the machine (amd64/v3, arm64/v9).
    """
    found = rank(image, machine)
    offered, own = _normal(image), _normal(machine)
    if found is not None or offered.os != own.os:
        return found
    if not offered.architecture or (
        offered.architecture == own.architecture and own.architecture in {"amd64", "arm64"}
    ):
        return len(_runs(own))
    return None


def _runs(machine: model.Platform) -> list[model.Platform]:
    """What a machine runs, the best first: its own programs, and the 32-bit ones of its family."""
    found = [machine]
    if machine.architecture == "amd64":
        found.append(model.Platform("386", machine.os))
    elif machine.architecture == "arm64":
        found += [model.Platform("arm", machine.os, variant) for variant in _ARM_VARIANTS]
    elif machine.architecture == "arm" and machine.variant in _ARM_VARIANTS:
        older = _ARM_VARIANTS[_ARM_VARIANTS.index(machine.variant) + 1 :]
        found += [model.Platform("arm", machine.os, variant) for variant in older]
    return found


def _normal(platform: model.Platform) -> model.Platform:
    """A platform by the names that containerd has for it; no system is this one."""
    architecture, variant = platform.architecture.lower(), (platform.variant or "").lower()
    architecture, implied = _ALIASES.get(architecture, (architecture, None))
    variant = variant if implied is None else implied
    variant = _VARIANTS.get(architecture, {}).get(variant, variant)
    return model.Platform(architecture, platform.os.lower() or "linux", variant)
