"""Durable GC roots: directories of symlinks below Nix's gcroots, which Nix searches at every collection.

All functions here block: call them in a thread.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable

from nixlet import errors
from nixlet.store import paths

#: How the names of half-made roots begin.
_UNFINISHED = ".new-"


class Roots:
    """The roots of one owner, by name: ``<gcroots>/nixlet/<owner>/<name>/<base name> -> store path``."""

    def __init__(self, gcroots: str, owner: str) -> None:
        """The roots of ``owner`` (a file name) below ``gcroots`` ("/nix/var/nix/gcroots")."""
        self._directory = os.path.join(gcroots, "nixlet", owner)

    def add(self, name: str, rooted: Iterable[paths.StorePath]) -> None:
        """Root paths under a name, in the place of what was rooted under it before. The paths need not exist yet.

        Raises:
            PermissionDeniedError: The directory can't be written.
        """
        target = os.path.join(self._directory, name)
        try:
            os.makedirs(self._directory, exist_ok=True)
            # Nix counts roots in the temporary directory as well: there is no moment without them.
            temporary = tempfile.mkdtemp(prefix=_UNFINISHED, dir=self._directory)
        except OSError as error:
            raise errors.PermissionDeniedError(
                f"can't make GC roots in {self._directory}: {error.strerror}", hint="run nixlet as root"
            ) from error
        try:
            os.chmod(temporary, 0o755)  # noqa: S103 (roots are no secret: users ask Nix who holds a path)
            for path in rooted:
                os.symlink(path, os.path.join(temporary, path.name))
            self._exchange(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _exchange(self, temporary: str, target: str) -> None:
        old = f"{temporary}.old"
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Let go what is rooted under a name."""
        shutil.rmtree(os.path.join(self._directory, name), ignore_errors=True)
        # The owner's directory goes with its last root, so that nothing stays behind on a node that is taken down.
        with contextlib.suppress(OSError):
            os.rmdir(self._directory)
            os.rmdir(os.path.dirname(self._directory))

    def names(self) -> list[str]:
        """The names under which something is rooted."""
        try:
            return sorted(name for name in os.listdir(self._directory) if not name.startswith(_UNFINISHED))
        except FileNotFoundError:
            return []

    def discard_unfinished(self) -> None:
        """Remove what a crash left half-made; for a time when nobody adds roots."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._directory):
                if name.startswith(_UNFINISHED):
                    shutil.rmtree(os.path.join(self._directory, name), ignore_errors=True)

    def paths(self, name: str) -> list[str]:
        """The base names of what is rooted under a name."""
        try:
            return sorted(os.listdir(os.path.join(self._directory, name)))
        except FileNotFoundError:
            return []
