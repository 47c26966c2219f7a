"""Views: a read-only picture of exactly one closure, made of directory redirects (docs/architecture.md, "The view").

Skeletons are their siblings for the strategy of bind mounts: the same tree without redirects, whose empty directories are
the mount points.

The metadata of a view is a small directory tree with one empty directory for each store path that is a directory; the
attribute ``trusted.overlay.redirect`` tells overlayfs where its content lies in the next lower layer, which is the store
itself (kernel documentation, filesystems/overlayfs, "redirect_dir"). Containers get the subdirectory ``v`` of the mounted
view, so that the store's own root, which overlayfs merges into the view's, stays out of their sight.

All functions here block: call them in a thread.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Sequence

from nixlet import errors
from nixlet.host import files, mounts
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


#: How the names of a view's metadata and of a skeleton end.
_META = ".meta"
_SKELETON = ".skeleton"


class Views:
    """The views below one directory: number N is mounted at ``N``, its metadata is ``N.meta``, its skeleton ``N.skeleton``."""

    def __init__(
        self, directory: str, *, store_dir: str, real_store_dir: str, faults: faults_module.Faults | None = None
    ) -> None:
        """A directory for the views.

        Args:
            directory: Where they are kept; on a file system that has trusted attributes.
            store_dir: The store's path as containers see it ("/nix/store").
            real_store_dir: The directory on this host that holds its files.
            faults: Where tests can have the process killed.
        """
        self._faults = faults or faults_module.Faults()
        self._directory = directory
        self._store_dir = store_dir
        self._real_store_dir = real_store_dir

    def mount_path(self, number: int) -> str:
        """Where a view is mounted."""
        return os.path.join(self._directory, str(number))

    def layer_path(self, number: int, strategy: model.Strategy = model.Strategy.VIEW) -> str:
        """What stands in a container's list of lower layers."""
        whole = self.mount_path(number) if strategy is model.Strategy.VIEW else self._skeleton_path(number)
        return os.path.join(whole, LAYER)

    def meta_path(self, number: int) -> str:
        """Where a view's metadata is."""
        return os.path.join(self._directory, f"{number}{_META}")

    def _skeleton_path(self, number: int) -> str:
        return os.path.join(self._directory, f"{number}{_SKELETON}")

    def is_ready(self, number: int, strategy: model.Strategy) -> bool:
        """Whether a view is mounted, or a skeleton is there; two stat calls."""
        if strategy is model.Strategy.VIEW:
            return mounts.is_mount_point(self.mount_path(number))
        return os.path.isdir(self._skeleton_path(number))

    def ensure(self, number: int, names: Sequence[str], strategy: model.Strategy = model.Strategy.VIEW) -> None:
        """Have a view mounted, or a skeleton built.

        Raises:
            FailedPreconditionError: A store path is missing, or the kernel refuses the mount.
        """
        if self.is_ready(number, strategy):
            return
        if strategy is model.Strategy.BIND:
            self._build(self._skeleton_path(number), names, redirects=False)
            self._faults.reach("skeleton-built")
            return
        meta, target = self.meta_path(number), self.mount_path(number)
        if not os.path.isdir(meta):
            self._build(meta, names, redirects=True)
            self._faults.reach("view-built")
        files.new_directories(target)
        options = f"lowerdir={meta}:{self._real_store_dir},redirect_dir=follow"
        if os.path.exists(os.path.join(meta, _METACOPY_MARK)):
            options += ",metacopy=on"
        mounts.mount("overlay", target, "overlay", mounts.MS_RDONLY, options)
        self._faults.reach("view-mounted")

    def _build(self, meta: str, names: Sequence[str], *, redirects: bool) -> None:
        temporary = meta + _UNFINISHED
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            files.new_directory(temporary)
            layer = os.path.join(temporary, LAYER)
            files.new_directories(layer + self._store_dir)
            for name in names:
                try:
                    self._add(temporary, name, redirects=redirects)
                except FileNotFoundError as error:
                    raise missing_path(os.path.join(self._store_dir, name)) from error
            # The attributes of a merged directory come from here; fixed times keep them the same in every view.
            path = layer + self._store_dir
            while path.startswith(layer):
                os.utime(path, (1, 1))
                path = os.path.dirname(path)
            files.sync_directory(temporary)
            os.rename(temporary, meta)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _add(self, meta: str, name: str, *, redirects: bool) -> None:
        source = os.path.join(self._real_store_dir, name)
        target = os.path.join(meta, LAYER) + os.path.join(self._store_dir, name)
        status = os.lstat(source)
        if stat.S_ISDIR(status.st_mode):
            files.new_directory(target)
            if redirects:
                os.setxattr(target, _REDIRECT, os.fsencode(f"/{name}"))
            self._copy_attributes(status, target)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(source), target)
            os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns), follow_symlinks=False)
        else:
            self._add_file(meta, name, source, target, status, redirects=redirects)

    def _add_file(
        self, meta: str, name: str, source: str, target: str, status: os.stat_result, *, redirects: bool
    ) -> None:
        try:
            os.link(source, target)
            return
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

    @staticmethod
    def _copy_attributes(status: os.stat_result, target: str) -> None:
        os.chown(target, status.st_uid, status.st_gid)
        os.chmod(target, stat.S_IMODE(status.st_mode))
        os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))

    def unmount(self, number: int) -> None:
        """Unmount a view, keeping its metadata; running containers keep their own clone of the mount."""
        mounts.unmount(self.mount_path(number))

    def remove(self, number: int) -> None:
        """Unmount a view and delete what it was made of; for closures that no container needs any more."""
        self.unmount(number)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self.mount_path(number))
        for directory in (self.meta_path(number), self._skeleton_path(number)):
            shutil.rmtree(directory, ignore_errors=True)
            shutil.rmtree(directory + _UNFINISHED, ignore_errors=True)

    def numbers(self) -> set[int]:
        """The views that have a mount point, metadata or a skeleton here."""
        found = (entry.partition(".")[0] for entry in os.listdir(self._directory))
        return {int(name) for name in found if name.isdigit()}

    def unmount_all(self) -> None:
        """Unmount every view, keeping the metadata."""
        for number in self.numbers():
            self.unmount(number)


def missing_path(path: str) -> errors.FailedPreconditionError:
    """The error for a store path that a container needs and the store lacks."""
    return errors.FailedPreconditionError(
        f"the store path {path} is missing from the Nix store", hint=f"bring it back with: nix-store --realise {path}"
    )
