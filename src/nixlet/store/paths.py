"""The grammar of store paths (Nix manual, "Store Path"; limits as Nix's own checks have them)."""

import re

from nixlet import errors

#: Nix's alphabet for base 32: no e, o, u, t.
NIX32 = "0123456789abcdfghijklmnpqrsvwxyz"

DEFAULT_STORE_DIR = "/nix/store"

#: "<hash>-<name>": 160 bits in base 32, and a name of at most 211 characters that is no "." or "..".
_BASE_NAME = re.compile(rf"[{NIX32}]{{32}}-(?!\.{{1,2}}(?:-|\Z))[0-9a-zA-Z+\-._?=]{{1,211}}")

_SHOWN = 120


class StorePath(str):
    """A store path whose form has been checked; as a string it is the whole path."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The base name, "<hash>-<name>"."""
        return self.rpartition("/")[2]

    @property
    def hash_part(self) -> str:
        """The 32 characters that identify it."""
        return self.name[:32]


def shown(text: str) -> str:
    """Foreign text for a sentence: quoted, control characters escaped, shortened."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def parse(text: str, store_dir: str = DEFAULT_STORE_DIR) -> StorePath:
    """Check a store path.

    Raises:
        InvalidArgumentError: It is no store path of that store.
    """
    directory, slash, name = text.rpartition("/")
    if not slash or directory != store_dir or not _BASE_NAME.fullmatch(name):
        raise errors.InvalidArgumentError(f"{shown(text)} is not a store path below {store_dir}")
    return StorePath(text)


def from_name(name: str, store_dir: str = DEFAULT_STORE_DIR) -> StorePath:
    """The store path with a base name; raises as ``parse`` does."""
    return parse(f"{store_dir}/{name}", store_dir)
