"""How an image's layer names its closure: nix-snapshotter's annotations, and the list that a closureInfo holds.

Two generations are read. The newer names one store path, the output of nixpkgs' closureInfo, whose file ``store-paths`` lists
the closure. The older has one annotation for each path. Annotations come from images, so everything in them is checked.
"""

import dataclasses
import hashlib
from collections.abc import Mapping

from nixlet import errors
from nixlet.store import paths

#: What all of them begin with.
PREFIX = "containerd.io/snapshot/nix"

CLOSURE = "containerd.io/snapshot/nix-closure"
LAYER = "containerd.io/snapshot/nix-layer"
STORE_PATH_PREFIX = "containerd.io/snapshot/nix-store-path."
_EARLY_PREFIX = "containerd.io/snapshot/nix/store."

#: The file of a closureInfo that lists the closure.
STORE_PATHS_FILE = "store-paths"

#: More paths than any real closure has; a NixOS system with a desktop has about 5,000.
MAX_PATHS = 20_000
MAX_LIST_BYTES = MAX_PATHS * 256


@dataclasses.dataclass(frozen=True, slots=True)
class ClosureReference:
    """A closure as an image names it: one closureInfo, or the paths themselves.

    Attributes:
        closure_info: The closureInfo's store path, or None in the older form.
        listed: The paths of the older form, in the image's order.
    """

    closure_info: paths.StorePath | None
    listed: tuple[paths.StorePath, ...] = ()

    @property
    def identity(self) -> str:
        """A name for the closure, equal for equal sets of paths, fit for a file name."""
        if self.closure_info is not None:
            return self.closure_info.name[:64]
        return hashlib.sha256("\n".join(sorted(self.listed)).encode()).hexdigest()[:32]

    def annotations(self) -> dict[str, str]:
        """The annotations that name this closure."""
        if self.closure_info is not None:
            return {CLOSURE: str(self.closure_info)}
        listed = {f"{STORE_PATH_PREFIX}{number}": str(path) for number, path in enumerate(self.listed)}
        return {LAYER: "true"} | listed


def parse_annotations(
    annotations: Mapping[str, str], store_dir: str = paths.DEFAULT_STORE_DIR
) -> ClosureReference | None:
    """The closure that a layer's annotations (or the labels made from them) name, or None if they name no store path.

    Raises:
        InvalidArgumentError: The annotations name something else than store paths, too many of them, or are of a form
            from before nix-snapshotter's first release.
    """
    closure = annotations.get(CLOSURE)
    if closure is not None:
        return ClosureReference(paths.parse(closure, store_dir))
    if LAYER not in annotations:
        if any(key.startswith(_EARLY_PREFIX) for key in annotations):
            raise errors.InvalidArgumentError(
                f"the image's layer has annotations {_EARLY_PREFIX}*, a form older than nix-snapshotter 0.1",
                hint="build the image again",
            )
        return None
    numbered: dict[int, str] = {}
    for key, value in annotations.items():
        if key.startswith(STORE_PATH_PREFIX):
            number = key.removeprefix(STORE_PATH_PREFIX)
            if not (number.isascii() and number.isdecimal()) or len(number) > 9 or str(int(number)) != number:
                raise errors.InvalidArgumentError(f"the annotation {paths.shown(key)} has no number at its end")
            numbered[int(number)] = value
    if not numbered:
        return None
    _check_count(len(numbered))
    listed = dict.fromkeys(paths.parse(numbered[number], store_dir) for number in sorted(numbered))
    return ClosureReference(None, tuple(listed))


def parse_store_paths(text: bytes | str, store_dir: str = paths.DEFAULT_STORE_DIR) -> tuple[paths.StorePath, ...]:
    """The paths that a closureInfo's ``store-paths`` lists, one a line, without repetitions.

    Raises:
        InvalidArgumentError: A line is no store path, or there are too many.
    """
    if len(text) > MAX_LIST_BYTES:
        raise errors.InvalidArgumentError(f"the list of store paths is larger than {MAX_LIST_BYTES} bytes")
    decoded = text if isinstance(text, str) else text.decode(errors="replace")
    lines = [line for line in decoded.split("\n") if line]
    _check_count(len(lines))
    return tuple(dict.fromkeys(paths.parse(line, store_dir) for line in lines))


def _check_count(count: int) -> None:
    if count > MAX_PATHS:
        raise errors.InvalidArgumentError(f"the closure has {count} paths, more than {MAX_PATHS}")
