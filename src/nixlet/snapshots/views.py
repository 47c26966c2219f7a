"""Views: a read-only picture of exactly one closure, made of directory redirects (docs/architecture.md, "The view").

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


class Views:
    """The views below one directory: number N is mounted at ``N``, its metadata is ``N.meta``."""

    def __init__(self, directory: str, *, store_dir: str, real_store_dir: str) -> None:
        """A directory for the views.

        Args:
            directory: Where they are kept; on a file system that has trusted attributes.
            store_dir: The store's path as containers see it ("/nix/store").
            real_store_dir: The directory on this host that holds its files.
        """
        self._directory = directory
        self._store_dir = store_dir
        self._real_store_dir = real_store_dir

    def mount_path(self, number: int) -> str:
        """Where a view is mounted."""
        return os.path.join(self._directory, str(number))

    def layer_path(self, number: int) -> str:
        """What stands in a container's list of lower layers."""
        return os.path.join(self._directory, str(number), LAYER)

    def meta_path(self, number: int) -> str:
        """Where a view's metadata is."""
        return os.path.join(self._directory, f"{number}.meta")

    def is_mounted(self, number: int) -> bool:
        """Whether a view is mounted; two stat calls."""
        return mounts.is_mount_point(self.mount_path(number))

    def ensure(self, number: int, names: Sequence[str]) -> None:
        """Have a view mounted, building what is missing.

        Raises:
            FailedPreconditionError: A store path is missing, or the kernel refuses the mount.
        """
        if self.is_mounted(number):
            return
        meta, target = self.meta_path(number), self.mount_path(number)
        if not os.path.isdir(meta):
            self._build(meta, names)
        os.makedirs(target, mode=0o755, exist_ok=True)
        options = f"lowerdir={meta}:{self._real_store_dir},redirect_dir=follow"
        if os.path.exists(os.path.join(meta, _METACOPY_MARK)):
            options += ",metacopy=on"
        mounts.mount("overlay", target, "overlay", mounts.MS_RDONLY, options)

    def _build(self, meta: str, names: Sequence[str]) -> None:
        temporary = meta + _UNFINISHED
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            os.mkdir(temporary, 0o755)
            layer = os.path.join(temporary, LAYER)
            os.makedirs(layer + self._store_dir, mode=0o755)
            for name in names:
                try:
                    self._add(temporary, name)
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

    def _add(self, meta: str, name: str) -> None:
        source = os.path.join(self._real_store_dir, name)
        target = os.path.join(meta, LAYER) + os.path.join(self._store_dir, name)
        status = os.lstat(source)
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(target)
            os.setxattr(target, _REDIRECT, os.fsencode(f"/{name}"))
            self._copy_attributes(status, target)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(source), target)
            os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns), follow_symlinks=False)
        else:
            self._add_file(meta, name, source, target, status)

    def _add_file(self, meta: str, name: str, source: str, target: str, status: os.stat_result) -> None:
        try:
            os.link(source, target)
            return
        except OSError as error:
            # Another file system or another mount of the same one, too many links, or a kernel that protects links.
            if error.errno not in {errno.EXDEV, errno.EMLINK, errno.EPERM}:
                raise
        if status.st_size <= _COPY_LIMIT:
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

    def remove(self, number: int) -> None:
        """Unmount a view and delete its metadata; running containers keep their own clone of the mount."""
        target = self.mount_path(number)
        mounts.unmount(target)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(target)
        for directory in (self.meta_path(number), self.meta_path(number) + _UNFINISHED):
            shutil.rmtree(directory, ignore_errors=True)

    def numbers(self) -> set[int]:
        """The views that have a mount point or metadata here."""
        found = (entry.removesuffix(_UNFINISHED).removesuffix(".meta") for entry in os.listdir(self._directory))
        return {int(name) for name in found if name.isdigit()}

    def unmount_all(self) -> None:
        """Unmount every view, keeping the metadata."""
        for number in self.numbers():
            mounts.unmount(self.mount_path(number))


def missing_path(path: str) -> errors.FailedPreconditionError:
    """The error for a store path that a container needs and the store lacks."""
    return errors.FailedPreconditionError(
        f"the store path {path} is missing from the Nix store", hint=f"bring it back with: nix-store --realise {path}"
    )


def probe(directory: str) -> None:
    """Try the mechanism for real: mount a tiny view, read a file through a container's kind of overlay over it.

    Args:
        directory: A directory on the file system where views and snapshots will be.

    Raises:
        UnsupportedError: It doesn't work here; the sentence says at which point.
    """
    with contextlib.ExitStack() as cleanup:
        base = os.path.join(directory, f".probe-{os.getpid()}")
        shutil.rmtree(base, ignore_errors=True)
        for part in ("store/pkg/bin", "views", "fs", "upper", "work", "root"):
            os.makedirs(os.path.join(base, part))
        cleanup.callback(shutil.rmtree, base, ignore_errors=True)
        with open(os.path.join(base, "store/pkg/bin/hello"), "w", encoding="ascii") as file:
            file.write("hello")
        views = Views(os.path.join(base, "views"), store_dir="/nix/store", real_store_dir=os.path.join(base, "store"))
        try:
            views.ensure(1, ["pkg"])
            cleanup.callback(views.remove, 1)
            root = os.path.join(base, "root")
            options = f"lowerdir={views.layer_path(1)}:{base}/fs,upperdir={base}/upper,workdir={base}/work"
            mounts.mount("overlay", root, "overlay", 0, options)
            cleanup.callback(mounts.unmount, root)
            with open(os.path.join(root, "nix/store/pkg/bin/hello"), encoding="ascii") as file:
                content = file.read()
        except (errors.NixletError, OSError) as error:
            raise errors.UnsupportedError(
                f"overlay views don't work below {directory}: {error}",
                hint="use a directory on a file system such as ext4, xfs, btrfs or tmpfs, that is no overlay itself",
            ) from error
        if content != "hello":
            raise errors.UnsupportedError(f"overlay views below {directory} show wrong content")
