"""Which store paths an image may name at all."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

from nixlet import errors
from nixlet.store import interface

#: Whether images may name store paths that nobody vouches for.
UnsignedPaths = Literal["allow", "deny"]


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """What is asked of the paths of an image's closure.

    Attributes:
        unsigned_paths: "deny" wants every path to have been built here, to carry a signature (the daemon checks those
            when it fetches), or to be named by its own content; "allow" takes what the store holds.
    """

    unsigned_paths: UnsignedPaths = "allow"

    @property
    def restricts(self) -> bool:
        """Whether ``check`` can refuse anything."""
        return self.unsigned_paths == "deny"

    def check(self, infos: Iterable[interface.PathInfo]) -> None:
        """Check the paths of a closure.

        Raises:
            PermissionDeniedError: One of them may not be used; the sentence names it.
        """
        if not self.restricts:
            return
        for info in infos:
            if not (info.ultimate or info.signatures or info.content_address):
                raise errors.PermissionDeniedError(
                    f"the store path {info.path} is unsigned, and unsigned_paths is set to deny",
                    hint=f"sign it (nix store sign {info.path}) or fetch it from a cache that does",
                )
