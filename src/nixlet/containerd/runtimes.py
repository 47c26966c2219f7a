"""The container runtimes beside runc that a machine has: the names are k3s's, so that its RuntimeClasses fit."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from nixlet.containerd import criplugins, tomlread

#: Where installers put runtimes without putting them on PATH: NVIDIA's toolkit, and Kwasm's WebAssembly shims.
DIRECTORIES = ("/usr/local/nvidia/toolkit", "/opt/kwasm/bin")

#: What runs containers by runc, or by a program that takes its place.
RUNC_V2 = "io.containerd.runc.v2"


@dataclasses.dataclass(frozen=True, slots=True)
class Runtime:
    """A container runtime.

    Attributes:
        type: containerd's name for the shim, as in "io.containerd.runc.v2".
        program: The OCI runtime program that runc's shim starts, or the shim itself.
    """

    type: str
    program: str

    @property
    def is_shim(self) -> bool:
        """Whether the program is a shim of its own."""
        return self.type != RUNC_V2


#: Name to type and program. A shim's program is named after its type (containerd, core/runtime/v2/README.md).
_KNOWN: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "crun": (RUNC_V2, "crun"),
        "nvidia": (RUNC_V2, "nvidia-container-runtime"),
        "nvidia-experimental": (RUNC_V2, "nvidia-container-runtime-experimental"),
        "nvidia-cdi": (RUNC_V2, "nvidia-container-runtime.cdi"),
        "spin": ("io.containerd.spin.v2", "containerd-shim-spin-v2"),
        **{
            name: (f"io.containerd.{name}.v1", f"containerd-shim-{name}-v1")
            for name in ("lunatic", "slight", "wws", "wasmedge", "wasmer", "wasmtime")
        },
    }
)

#: The names of all that are known, whether they are installed or not.
NAMES = frozenset(_KNOWN)


def discover(path: str, directories: Iterable[str] = DIRECTORIES) -> dict[str, Runtime]:
    """The known runtimes that are installed, by name.

    Args:
        path: Where to look, as in PATH. Relative entries are left out: what root runs must not depend on where it stands.
        directories: Where to look before.
    """
    search = [*directories, *filter(os.path.isabs, path.split(os.pathsep))]
    found = {}
    for name, (kind, program) in _KNOWN.items():
        candidates = (os.path.join(directory, program) for directory in search)
        place = next((each for each in candidates if os.path.isfile(each) and os.access(each, os.X_OK)), None)
        if place is not None:
            found[name] = Runtime(kind, place)
    return found


def configured(table: Mapping[str, Any]) -> tuple[Mapping[str, Mapping[str, Any]], str | None]:
    """The runtimes that a configuration of containerd's has, by name, and the name of the default one where it says so."""
    said: Mapping[str, Any] = tomlread.at(table, criplugins.place(table["version"], "runtime", "containerd")) or {}
    return said.get("runtimes") or {}, said.get("default_runtime_name")
