"""Views: a read-only picture of exactly one closure, made of directory redirects (docs/architecture.md, "The view").

Skeletons are their siblings for the strategy of bind mounts: the same tree without redirects, whose empty directories are
the mount points.

The metadata of a view is a small directory tree with one empty directory for each store path that is a directory; the
attribute ``trusted.overlay.redirect`` tells overlayfs where its content lies in the next lower layer, which is the store
itself (kernel documentation, filesystems/overlayfs, "redirect_dir"). Containers get the subdirectory ``v`` of the mounted
view, so that the store's own root, which overlayfs merges into the view's, stays out of their sight.

A mounted overlay goes on showing the files that it has found once, and a path that was missing stays an empty directory in it.
So a view remembers which files it was made over; when a path was replaced, the next container gets a new mount beside the old
one, which those that run keep. Metadata and skeletons hold for one boot: what a power cut may have cut is made again.

All functions here block: call them in a thread.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from nixlet import errors
from nixlet.host import files, mounts, userns
from nixlet.snapshots import faults as faults_module
from nixlet.snapshots import model

#: The part of a mounted view that containers get as a layer.
LAYER = "v"

_REDIRECT = "trusted.overlay.redirect"
_METACOPY = "trusted.overlay.metacopy"

#: A plain-file store path that can't be hard linked is copied up to this size (bytes); above it gets a metacopy inode.
_COPY_LIMIT = 64 << 10

#: How the name of metadata ends that is being made.
_UNFINISHED = ".new"

#: Present beside ``v`` when the view needs overlayfs's metacopy feature.
_METACOPY_MARK = "metacopy"

#: Beside ``v``: the boot in which metadata was made, and over which files and links.
_RECORD = "record.json"

#: How the names of a view's metadata and of a skeleton end.
_META = ".meta"
_SKELETON = ".skeleton"

#: "7", "7.1" (mount points), "7.meta", "7.1.skeleton", "7.meta.new".
_NAME = re.compile(r"(\d+)(?:\.(\d+))?(\.meta|\.skeleton)?(\.new)?")

_log = logging.getLogger("nixlet.snapshots")


class Seen(NamedTuple):
    """What a store path was when it was looked at.

    Attributes:
        device: The number of its file system.
        inode: Its number there, which a file that comes after it may get again.
        changed: When the inode changed last (ns), by which that is told.
        mode: Its type and its permissions (st_mode).
        owner: Its user.
        group: Its group.
        target: Where it leads, for a symlink.
    """

    device: int
    inode: int
    changed: int
    mode: int
    owner: int
    group: int
    target: str

    @property
    def is_directory(self) -> bool:
        """Whether its content is looked up in the store and not held by metadata."""
        return stat.S_ISDIR(self.mode)


class Pieces(NamedTuple):
    """What a view is mounted over: its metadata and the store's directory."""

    meta: str
    store: str

    def options(self, meta: str = "", store: str = "") -> str:
        """The options of the mount; over other names of the two where they are given."""
        metacopy = ",metacopy=on" if os.path.exists(os.path.join(self.meta, _METACOPY_MARK)) else ""
        return f"lowerdir={meta or self.meta}:{store or self.store},redirect_dir=follow{metacopy}"


class _Shown(NamedTuple):
    """A view that is mounted: where, over which metadata and which directories (a digest of them)."""

    path: str
    meta: str
    over: bytes


class Views:
    """The views below one directory: number N is mounted at ``N``, its metadata is ``N.meta``, its skeleton ``N.skeleton``.

    Those that follow when store paths were replaced are ``N.1``, ``N.1.meta``, ``N.1.skeleton`` and so on.
    """

    def __init__(
        self,
        directory: str,
        *,
        store_dir: str,
        real_store_dir: str,
        boot: str = "",
        faults: faults_module.Faults | None = None,
    ) -> None:
        """A directory for the views.

        Args:
            directory: Where they are kept; on a file system that has trusted attributes.
            store_dir: The store's path as containers see it ("/nix/store").
            real_store_dir: The directory on this host that holds its files.
            boot: What tells this boot of the machine from others.
            faults: Where tests can have the process killed.
        """
        self._faults = faults or faults_module.Faults()
        self._directory = directory
        self._store_dir = store_dir
        self._real_store_dir = real_store_dir
        self._boot = boot
        # Root of a user namespace can't give anything to owners that it doesn't map, and those of the store mostly are such.
        self._copies_owners = not userns.is_inside()
        # What is mounted by this process: of a mount from before nobody knows over what it was made.
        self._shown: dict[int, _Shown] = {}
        self._skeletons: dict[int, str] = {}

    def layer(self, number: int, strategy: model.Strategy) -> str | None:
        """What stands in a container's list of lower layers, if it has been shown and is there; two stat calls."""
        if strategy is model.Strategy.BIND:
            skeleton = self._skeletons.get(number)
            return os.path.join(skeleton, LAYER) if skeleton and os.path.isdir(skeleton) else None
        shown = self._shown.get(number)
        return os.path.join(shown.path, LAYER) if shown and mounts.is_mount_point(shown.path) else None

    def pieces(self, number: int) -> Pieces:
        """Over what a closure is shown, which has been."""
        return Pieces(self._shown[number].meta, self._real_store_dir)

    def look(self, names: Iterable[str]) -> tuple[dict[str, Seen], list[str]]:
        """What store paths are on the disk, and the names of those that aren't there."""
        seen, missing = {}, []
        for name in names:
            path = os.path.join(self._real_store_dir, name)
            try:
                status = os.lstat(path)
                target = os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
                attributes = (status.st_mode, status.st_uid, status.st_gid)
                seen[name] = Seen(status.st_dev, status.st_ino, status.st_ctime_ns, *attributes, target)
            except FileNotFoundError:
                missing.append(name)
        return seen, missing

    def show(self, number: int, seen: Mapping[str, Seen], strategy: model.Strategy = model.Strategy.VIEW) -> str:
        """Have a view mounted, or a skeleton built, over exactly what was seen; the layer for a container.

        Raises:
            FailedPreconditionError: A store path vanished, something is mounted on it, or the kernel refuses the mount.
        """
        self._discard_of_other_boots(number)
        if strategy is model.Strategy.BIND:
            skeleton = self._skeletons[number] = self._tree(number, _SKELETON, seen)
            return os.path.join(skeleton, LAYER)
        self._check_covered(seen)
        meta = self._tree(number, _META, seen)
        over = _digest(seen)
        shown = self._shown.get(number)
        if shown is None or (shown.meta, shown.over) != (meta, over) or not mounts.is_mount_point(shown.path):
            shown = self._shown[number] = _Shown(self._mount(number, meta), meta, over)
        return os.path.join(shown.path, LAYER)

    def _check_covered(self, names: Iterable[str]) -> None:
        """Refuse store paths that something is mounted on or in: overlayfs would show what lies below."""
        store = os.path.realpath(self._real_store_dir)
        covered = {os.path.relpath(entry.path, store).partition("/")[0]: entry.path for entry in mounts.below(store)}
        for name in sorted(covered.keys() & set(names)):
            raise errors.FailedPreconditionError(
                f"something is mounted on {covered[name]}, which containers would not see",
                hint=f"unmount it: umount {covered[name]}",
            )

    def _mount(self, number: int, meta: str) -> str:
        """Mount a view at a place of its own.

        The one before stays until the next: a container may just be starting over it.
        """
        before = self._shown.get(number)
        kept = before.path if before is not None and mounts.is_mount_point(before.path) else ""
        for each in self._generations(number, ""):
            if (path := self._path(number, each, "")) != kept:
                self._unmount(path, remove=True)
        target = self._path(number, max(self._generations(number, ""), default=-1) + 1, "")
        files.new_directory(target)
        options = Pieces(meta, self._real_store_dir).options()
        mounts.mount("overlay", target, "overlay", mounts.MS_RDONLY, options)
        self._faults.reach("view-mounted")
        return target

    def _tree(self, number: int, kind: str, seen: Mapping[str, Seen]) -> str:
        """Metadata or a skeleton that fits what was seen.

        One that doesn't fit any more stays: containers may run over it.
        """
        generations = self._generations(number, kind)
        latest = max(generations, default=-1)
        if latest >= 0 and self._fits(self._path(number, latest, kind), seen):
            return self._path(number, latest, kind)
        made = self._path(number, latest + 1, kind)
        self._build(made, seen, redirects=kind == _META)
        self._faults.reach("view-built" if kind == _META else "skeleton-built")
        return made

    def _path(self, number: int, generation: int, kind: str) -> str:
        later = f".{generation}" if generation else ""
        return os.path.join(self._directory, f"{number}{later}{kind}")

    def _generations(self, number: int, kind: str) -> set[int]:
        found = (_NAME.fullmatch(entry) for entry in os.listdir(self._directory))
        return {
            int(match[2] or 0)
            for match in found
            if match and int(match[1]) == number and (match[3] or "") == kind and not match[4]
        }

    def _record(self, tree: str) -> dict[str, object] | None:
        """What was written down when a tree was made, or None for one of an earlier version."""
        try:
            with open(os.path.join(tree, _RECORD), encoding="utf-8") as file:
                record = json.load(file)
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def _fits(self, tree: str, seen: Mapping[str, Seen]) -> bool:
        record = self._record(tree)
        if record is None or record.get("boot") != self._boot:
            return False
        others = record.get("others")
        present = {name: each for name, each in seen.items() if not each.is_directory}
        if not isinstance(others, dict) or others.keys() != present.keys():
            return False
        if record.get("directories") != _attributes(seen):
            return False
        return all(others[name] in (_linked(each), _copied(each)) for name, each in present.items())

    def _discard_of_other_boots(self, number: int) -> None:
        """Delete what was made before the machine started: a power cut may have left it empty, and nobody runs over it."""
        for kind in (_META, _SKELETON):
            for generation in self._generations(number, kind):
                tree = self._path(number, generation, kind)
                record = self._record(tree)
                if record is not None and record.get("boot") != self._boot:
                    shutil.rmtree(tree)

    def _build(self, tree: str, seen: Mapping[str, Seen], *, redirects: bool) -> None:
        temporary = tree + _UNFINISHED
        shutil.rmtree(temporary, ignore_errors=True)
        others: dict[str, list[object]] = {}
        try:
            layer = os.path.join(temporary, LAYER)
            files.new_directories(layer + self._store_dir)
            for name, each in seen.items():
                try:
                    linked = self._add(temporary, name, redirects=redirects)
                except FileNotFoundError as error:
                    raise missing_path(os.path.join(self._store_dir, name)) from error
                if not each.is_directory:
                    others[name] = _linked(each) if linked else _copied(each)
            # The attributes of a merged directory come from here; fixed times keep them the same in every view.
            path = layer + self._store_dir
            while path.startswith(layer):
                os.utime(path, (1, 1))
                path = os.path.dirname(path)
            with open(os.path.join(temporary, _RECORD), "w", encoding="utf-8") as file:
                json.dump({"boot": self._boot, "directories": _attributes(seen), "others": others}, file)
            os.rename(temporary, tree)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _add(self, meta: str, name: str, *, redirects: bool) -> bool:
        """Add a store path; whether it is the very file of the store."""
        source = os.path.join(self._real_store_dir, name)
        target = os.path.join(meta, LAYER) + os.path.join(self._store_dir, name)
        status = os.lstat(source)
        if stat.S_ISDIR(status.st_mode):
            files.new_directory(target)
            if redirects:
                os.setxattr(target, _REDIRECT, os.fsencode(f"/{name}"))
            self._copy_attributes(status, target)
            return False
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(source), target)
            os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns), follow_symlinks=False)
            return False
        return self._add_file(meta, name, source, target, status, redirects=redirects)

    def _add_file(
        self, meta: str, name: str, source: str, target: str, status: os.stat_result, *, redirects: bool
    ) -> bool:
        try:
            os.link(source, target)
            return True
        except OSError as error:
            # Another file system or another mount of the same one, too many links, or a kernel that protects links.
            if error.errno not in {errno.EXDEV, errno.EMLINK, errno.EPERM}:
                raise
        if status.st_size <= _COPY_LIMIT or not redirects:
            # For a skeleton, files are copied however large: not every containerd can bind a file to a file.
            shutil.copyfile(source, target)
        else:
            with open(target, "xb") as file:
                file.truncate(status.st_size)
            os.setxattr(target, _METACOPY, b"")
            os.setxattr(target, _REDIRECT, os.fsencode(f"/{name}"))
            with open(os.path.join(meta, _METACOPY_MARK), "wb"):
                pass
        self._copy_attributes(status, target)
        return False

    def _copy_attributes(self, status: os.stat_result, target: str) -> None:
        if self._copies_owners:
            os.chown(target, status.st_uid, status.st_gid)
        os.chmod(target, stat.S_IMODE(status.st_mode))
        os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))

    def remove(self, number: int) -> None:
        """Unmount a view and delete what it was made of; for closures that no container needs any more."""
        self._shown.pop(number, None)
        self._skeletons.pop(number, None)
        for entry in os.listdir(self._directory):
            match = _NAME.fullmatch(entry)
            if match and int(match[1]) == number:
                path = os.path.join(self._directory, entry)
                if not match[3]:
                    self._unmount(path, remove=True)
                else:
                    shutil.rmtree(path, ignore_errors=True)

    def numbers(self) -> set[int]:
        """The views that have a mount point, metadata or a skeleton here."""
        return {int(match[1]) for match in map(_NAME.fullmatch, os.listdir(self._directory)) if match}

    def unmount_all(self) -> None:
        """Unmount every view, keeping the metadata; running containers keep their own clones of the mounts."""
        self._shown.clear()
        for entry in os.listdir(self._directory):
            match = _NAME.fullmatch(entry)
            if match and not match[3]:
                self._unmount(os.path.join(self._directory, entry), remove=False)

    @staticmethod
    def _unmount(path: str, *, remove: bool) -> None:
        """Unmount a view, also one that somebody is in; a failure is told, and no reason to leave others mounted."""
        try:
            mounts.unmount(path, mounts.UMOUNT_NOFOLLOW | mounts.MNT_DETACH)
            if remove:
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(path)
        except (errors.NixletError, OSError) as error:
            _log.warning("the view %s stays mounted: %s", path, error)


def _linked(seen: Seen) -> list[object]:
    """What is written down of a file that metadata shares with the store: while it does, its number is nobody else's."""
    return ["linked", seen.device, seen.inode]


def _copied(seen: Seen) -> list[object]:
    """What is written down of a file or link that was copied."""
    return ["copied", seen.target] if seen.target else ["copied", seen.device, seen.inode, seen.changed]


def _attributes(seen: Mapping[str, Seen]) -> str:
    """A digest of what metadata copies of directories."""
    listed = sorted((name, each.mode, each.owner, each.group) for name, each in seen.items() if each.is_directory)
    return hashlib.blake2b(repr(listed).encode(), digest_size=16).hexdigest()


def _digest(seen: Mapping[str, Seen]) -> bytes:
    """What tells the directories of a closure from others that were there before under their names."""
    listed = sorted((name, each) for name, each in seen.items() if each.is_directory)
    return hashlib.blake2b(repr(listed).encode(), digest_size=16).digest()


def missing_path(path: str) -> errors.FailedPreconditionError:
    """The error for a store path that a container needs and the store lacks."""
    return errors.FailedPreconditionError(
        f"the store path {path} is missing from the Nix store", hint=f"bring it back with: nix-store --realise {path}"
    )
