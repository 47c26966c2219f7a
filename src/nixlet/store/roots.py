"""Durable GC roots: directories of symlinks below Nix's gcroots, which Nix searches at every collection.

All functions here block: call them in a thread.
"""

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator

from nixlet import errors
from nixlet.host import files
from nixlet.store import paths

#: How the names of half-made roots begin.
_UNFINISHED = ".new-"


def directory(gcroots: str, owner: str) -> str:
    """Where an owner's roots are, below ``gcroots``."""
    return os.path.join(gcroots, "nixlet", owner)


class Roots:
    """The roots of one owner, by name: ``<gcroots>/nixlet/<owner>/<name>/<base name> -> store path``."""

    def __init__(self, gcroots: str, owner: str) -> None:
        """The roots of ``owner`` (a file name) below ``gcroots`` ("/nix/var/nix/gcroots")."""
        self._directory = directory(gcroots, owner)
        # Threads take turns: adding and removing rename in and out of the same places.
        self._lock = threading.Lock()

    def add(self, name: str, rooted: Iterable[paths.StorePath]) -> None:
        """Root paths under a name, in the place of what was rooted under it before. The paths need not exist yet.

        Raises:
            PermissionDeniedError: The directory can't be written.
            FailedPreconditionError: The file system is full, or another such trouble.
        """
        target = self._entry(name)
        links = {path.name: str(path) for path in rooted}
        with self._changing():
            if self._links(target) == links:
                return
            # Nix counts roots in the temporary directory as well: there is no moment without them.
            temporary = self._temporary()
            try:
                os.chmod(temporary, 0o755)  # noqa: S103 (roots are no secret: users ask Nix who holds a path)
                for base_name, path in links.items():
                    os.symlink(path, os.path.join(temporary, base_name))
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
        """Let go what is rooted under a name, if anything is; raises as ``add`` does."""
        target = self._entry(name)
        with self._changing():
            if os.path.isdir(target):
                # At once, and not link by link: an interrupted removal leaves nothing under the name.
                temporary = self._temporary()
                os.rename(target, temporary)
                shutil.rmtree(temporary, ignore_errors=True)
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
        """Remove what a crash left half-made."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._directory):
                if name.startswith(_UNFINISHED):
                    shutil.rmtree(os.path.join(self._directory, name), ignore_errors=True)

    def paths(self, name: str) -> list[str]:
        """The base names of what is rooted under a name."""
        return sorted(self._links(self._entry(name)) or ())

    def _entry(self, name: str) -> str:
        # A directory of this name is going to be removed with all that is in it.
        if not name or "/" in name or name.startswith("."):
            raise errors.InvalidArgumentError(f"{paths.shown(name)} can't be the name of a GC root")
        return os.path.join(self._directory, name)

    @staticmethod
    def _links(directory: str) -> dict[str, str] | None:
        try:
            return {name: os.readlink(os.path.join(directory, name)) for name in os.listdir(directory)}
        except FileNotFoundError:
            return None

    def _temporary(self) -> str:
        for _ in range(10):
            # Another owner's last root may take the common directory away at any of these steps.
            with contextlib.suppress(FileNotFoundError):
                files.new_directories(self._directory)
                return tempfile.mkdtemp(prefix=_UNFINISHED, dir=self._directory)
        raise FileNotFoundError(2, "the directory vanishes again and again", self._directory)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except PermissionError as error:
            raise errors.PermissionDeniedError(
                f"can't change the GC roots in {self._directory}: {error.strerror}", hint="run nixlet as root"
            ) from error
        except OSError as error:
            raise errors.FailedPreconditionError(
                f"can't change the GC roots in {self._directory}: {error.strerror}"
            ) from error
