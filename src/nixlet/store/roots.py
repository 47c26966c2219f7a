"""Durable GC roots: directories of symlinks below Nix's gcroots, which Nix searches at every collection.

Who may not write there has them in a directory of its own, and tells Nix of each link (an indirect root: Nix manual, "nix-store --add-root").
Nix forgets such a link when it is gone, or leads to something else, at its next collection.

All functions here block: call them in a thread.
"""

import contextlib
import hashlib
import os
import stat
import threading
from collections.abc import Iterable, Iterator

from nixlet import errors
from nixlet.host import files, userns
from nixlet.store import paths


def owner_of(root: str) -> str:
    """A name for the GC roots of the snapshotter of a root: two on one host share a store, not their roots."""
    return hashlib.sha256(root.encode()).hexdigest()[:16]


def of_snapshotter(gcroots: str, root: str) -> "Roots":
    """The roots of the snapshotter of a root: below Nix's ``gcroots`` for whoever may write there, else in the root itself."""
    # (the machine's root is told where that can't be written)
    privileged = os.geteuid() == 0 and not userns.is_inside()
    indirect = not (privileged or os.access(gcroots, os.W_OK | os.X_OK))
    return Roots(os.path.join(root, "gcroots") if indirect else gcroots, owner_of(root), indirect=indirect)


class Roots:
    """The roots of one owner, by name: ``<gcroots>/nixlet/<owner>/<name>/<base name> -> store path``.

    They change link by link, new ones first: at no moment, and in nothing that a crash leaves, is a path unprotected that
    was rooted before and is to be rooted afterwards. A link in the place of a directory is somebody's own, and is not followed.
    """

    def __init__(self, gcroots: str, owner: str, *, indirect: bool = False) -> None:
        """The roots of ``owner`` (a file name) below ``gcroots`` ("/nix/var/nix/gcroots").

        Args:
            gcroots: Nix's directory, or one of our own.
            owner: Whose.
            indirect: It is our own: Nix has to be told of the links.
        """
        self._directory = os.path.join(gcroots, "nixlet", owner)
        self.indirect = indirect
        # Threads take turns: the last root takes the directory along that another one is about to be put into.
        self._lock = threading.Lock()
        # Whether the names of the owner's directory and of those above it are on the disk, as they were when it was last made.
        self._durable = False

    @property
    def directory(self) -> str:
        """Where they are."""
        return self._directory

    def set(self, name: str, rooted: Iterable[paths.StorePath]) -> None:
        """Root paths durably under a name, in the place of what was rooted under it before. They need not exist yet.

        Raises:
            PermissionDeniedError: The directory can't be written.
            FailedPreconditionError: Something there is none of these roots; nothing is changed then.
            NixletError: The file system refuses, as in ``files.refused``.
        """
        target = self._entry(name)
        links = {path.name: str(path) for path in rooted}
        with self._changing():
            present = self._links(target)
            self._make(target)
            for base_name, path in links.items():
                if present.get(base_name) != path:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(target, base_name))
                    os.symlink(path, os.path.join(target, base_name))
            # Also what was there: whoever made it may have been killed before this.
            files.sync_directory(target)
            files.sync_directory(self._directory)
            for base_name in present.keys() - links.keys():
                os.unlink(os.path.join(target, base_name))

    def remove(self, name: str) -> None:
        """Let go what is rooted under a name, if anything is; raises as ``set`` does."""
        target = self._entry(name)
        with self._changing():
            for base_name in self._links(target):
                os.unlink(os.path.join(target, base_name))
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(target)
            # The owner's directory goes with its last root, so that nothing stays behind on a node that is taken down.
            with contextlib.suppress(OSError):
                os.rmdir(self._directory)
                os.rmdir(os.path.dirname(self._directory))

    def names(self) -> list[str]:
        """The names under which something is rooted, by this run or by one before; raises as ``set`` does."""
        with self._changing():
            self._check(self._directory)
            try:
                return sorted(os.listdir(self._directory))
            except FileNotFoundError:
                return []

    def paths(self, name: str) -> list[str]:
        """The base names of what is rooted under a name; raises as ``set`` does."""
        target = self._entry(name)
        with self._changing():
            return sorted(self._links(target))

    def links(self, name: str) -> list[str]:
        """The links that root something under a name, as paths; raises as ``set`` does."""
        return [os.path.join(self._entry(name), base_name) for base_name in self.paths(name)]

    def _entry(self, name: str) -> str:
        # What is in a directory of this name is going to be removed.
        if name in {"", ".", ".."} or "/" in name:
            raise errors.InvalidArgumentError(f"{paths.shown(name)} can't be the name of a GC root")
        return os.path.join(self._directory, name)

    def _links(self, directory: str) -> dict[str, str]:
        self._check(directory)
        links = {}
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(directory):
                path = os.path.join(directory, name)
                if not stat.S_ISLNK(os.lstat(path).st_mode):
                    raise self._strange(path)
                links[name] = os.readlink(path)
        return links

    def _check(self, directory: str) -> None:
        """Refuse a directory that is a link, or in one: it may lead into the store, whose files would be deleted."""
        place = os.path.dirname(os.path.dirname(self._directory))
        for name in os.path.relpath(directory, place).split("/"):
            place = os.path.join(place, name)
            try:
                mode = os.lstat(place).st_mode
            except FileNotFoundError:
                return
            if not stat.S_ISDIR(mode):
                raise self._strange(place)

    def _make(self, target: str) -> None:
        """Have a directory, with the names of its parents on the disk."""
        common = os.path.dirname(self._directory)
        gcroots = os.path.dirname(common)
        for _ in range(10):
            # Another owner's last root may take the common directory away at any of these steps.
            with contextlib.suppress(FileNotFoundError):
                files.new_directories(gcroots)
                # All may read them: users ask Nix who holds a path.
                for place in (common, self._directory):
                    if files.own_directory(place):
                        self._durable = False
                if not self._durable:
                    # Also where they were there: whoever made them may have been killed before this.
                    files.sync_directory(gcroots)
                    files.sync_directory(common)
                    self._durable = True
                files.own_directory(target)
                return
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
            raise files.refused(f"can't change the GC roots in {self._directory}", error) from error

    def _strange(self, path: str) -> errors.FailedPreconditionError:
        return errors.FailedPreconditionError(
            f"can't change the GC roots in {self._directory}: {path} is none of them, and stays as it is",
            hint="move it to another place below Nix's gcroots",
        )
