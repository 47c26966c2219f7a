"""Which strategies work here: found by mounting a small one and reading it back, never by comparing version numbers.

The probe is a program of its own (``python -m nixlet.snapshots.probe``) in a mount namespace of its own: nothing of it can
stay behind in ours. It takes some tenths of a second, so findings that hold are kept, for one boot of the kernel and for the
devices that they were made on. What fails for a passing reason, such as a full disk, is tried again.
"""

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping

from nixlet import errors
from nixlet.host import files, fuseoverlay, mounts, process, procfs, userns
from nixlet.snapshots import model
from nixlet.snapshots import views as views_module

#: What a person may ask for; "auto" is the first of the strategies that works.
CHOICES = ("auto", *(strategy.value for strategy in model.Strategy))

_FILE = "probe.json"

#: How the names of a probe's directories begin.
_DIRECTORY = ".probe-"

#: Refusals that say nothing of a strategy.
_PASSING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM),
    *(errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR, errno.EBUSY),
}

#: Seconds for a few mounts; a disk that sleeps must have the time to wake up.
_TIMEOUT = 60.0

#: Strategies, with the reason why they don't work here; empty for those that do.
Findings = Mapping[str, str]


async def findings(root: str, real_store_dir: str, overlay: model.Overlay = model.Overlay.KERNEL) -> Findings:
    """Which strategies work below a snapshotter's root, with the reasons of those that don't.

    Args:
        root: The snapshotter's directory; the findings are kept there.
        real_store_dir: The directory with the store's files.
        overlay: Who makes containers' roots.

    Raises:
        CommandFailedError: The probe itself failed.
        ResourceExhaustedError, UnavailableError: Something passing was in the way, such as a full disk.
    """
    path = os.path.join(root, _FILE)
    here = [*_circumstances(root, real_store_dir), overlay.value]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(_read(path))
        if kept["circumstances"] == here:
            return {strategy.value: str(kept["findings"][strategy.value]) for strategy in model.Strategy}
    argv = command(root, real_store_dir, overlay)
    done = (await process.run(argv, timeout=_TIMEOUT)).check()
    answer = json.loads(done.stdout)
    if answer["passing"]:
        number, where = answer["passing"]
        raise files.refused(
            f"a container's root file system can't be tried below {root} ({where})", OSError(number, "")
        )
    found: dict[str, str] = answer["findings"]
    if not all(found.values()):
        files.write_atomically(path, json.dumps({"circumstances": here, "findings": found}), mode=0o600)
    return found


async def choose(
    wanted: str, root: str, real_store_dir: str, overlay: model.Overlay = model.Overlay.KERNEL
) -> model.Strategy:
    """The strategy to use: the one that is wanted, or the first that works.

    Raises:
        UnsupportedError: It doesn't work here, or none does; the sentence says why.
        ResourceExhaustedError, UnavailableError: Something passing was in the way, such as a full disk.
    """
    found = await findings(root, real_store_dir, overlay)
    candidates = list(model.Strategy) if wanted == "auto" else [model.Strategy(wanted)]
    for strategy in candidates:
        if not found[strategy.value]:
            return strategy
    reasons = "; ".join(f"{strategy.value}: {found[strategy.value]}" for strategy in candidates)
    raise errors.UnsupportedError(
        f"containers can't be given a root file system below {root} ({reasons})",
        hint="use a directory on a file system such as ext4, xfs, btrfs or tmpfs that is no overlay itself, such as a volume",
    )


def _circumstances(root: str, real_store_dir: str) -> list[object]:
    """What the findings hold for."""
    devices = os.stat(root).st_dev, os.stat(real_store_dir).st_dev
    return [procfs.boot_id(), *devices, os.geteuid(), userns.is_inside()]


class _PassingError(Exception):
    """A strategy couldn't be tried for a reason that says nothing of it."""


async def probe(root: str, real_store_dir: str, overlay: model.Overlay) -> Findings:
    """Try each strategy; for a program of its own: blocks, and mounts in the process's own mount namespace.

    What is made below ``root`` is removed again, and the mounts end with the namespace.
    """
    found = {}
    for strategy in model.Strategy:
        with _own_directory(root) as base:
            try:
                await _try(base, real_store_dir, strategy, overlay)
                found[strategy.value] = ""
            except (errors.NixletError, OSError) as error:
                refusal = error if isinstance(error, OSError) else error.__cause__
                if isinstance(refusal, OSError) and refusal.errno in _PASSING:
                    raise _PassingError(refusal.errno, refusal.filename or str(error)) from error
                found[strategy.value] = str(error)
            finally:
                for entry in reversed(mounts.below(base)):
                    mounts.unmount(entry.path)
    return found


@contextlib.contextmanager
def _own_directory(root: str) -> Iterator[str]:
    """A directory for the time of the context; while its probe lives it is locked."""
    try:
        base = tempfile.mkdtemp(prefix=_DIRECTORY, dir=root)
    except OSError as error:
        raise _PassingError(error.errno, error.filename) from error
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield base
    finally:
        # Through what is still mounted in it the store itself would be reached; the next sweep takes what stays.
        with contextlib.suppress(errors.FailedPreconditionError):
            mounts.remove_tree(base, ignore_errors=True)
        os.close(fd)


def sweep(root: str) -> None:
    """Remove what killed probes left below a snapshotter's root; blocks."""
    for entry in os.listdir(root):
        if entry.startswith(_DIRECTORY):
            with contextlib.suppress(OSError, errors.FailedPreconditionError), contextlib.ExitStack() as stack:
                fd = os.open(os.path.join(root, entry), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mounts.remove_tree(os.path.join(root, entry))


async def _try(base: str, real_store_dir: str, strategy: model.Strategy, overlay: model.Overlay) -> None:
    """Make a container's root over a store of one path, and over the real store, and look into both."""
    own_store = os.path.join(base, "store")
    files.new_directories(os.path.join(own_store, "pkg/bin"))
    files.write_atomically(os.path.join(own_store, "pkg/bin/hello"), "hello")
    await _look(
        base, "own", own_store, ["pkg"], strategy, overlay, lambda store: _read(os.path.join(store, "pkg/bin/hello"))
    )
    # The real store may lie on file systems that a view can't be stacked upon.
    with os.scandir(real_store_dir) as entries:
        example = next((entry.name for entry in entries if entry.is_dir(follow_symlinks=False)), None)
    names = [example] if example else []
    await _look(
        base,
        "real",
        real_store_dir,
        names,
        strategy,
        overlay,
        lambda store: sorted(os.listdir(os.path.join(store, *names))),
    )


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


async def _look(
    base: str,
    name: str,
    store: str,
    names: list[str],
    strategy: model.Strategy,
    overlay: model.Overlay,
    look: Callable[[str], object],
) -> None:
    here = os.path.join(base, name)
    for part in ("views", "fs", "upper", "work", "root"):
        files.new_directories(os.path.join(here, part))
    views = views_module.Views(os.path.join(here, "views"), store_dir="/nix/store", real_store_dir=store)
    seen, _ = views.look(names)
    layer = views.show(1, seen, strategy)
    root = os.path.join(here, "root")
    options = f"lowerdir={layer}:{here}/fs,upperdir={here}/upper,workdir={here}/work"
    async with contextlib.AsyncExitStack() as stack:
        if overlay is model.Overlay.FUSE_OVERLAYFS:
            await stack.enter_async_context(fuseoverlay.shown(root, options))
        else:
            mounts.mount("overlay", root, "overlay", 0, ",".join((options, *mounts.overlay_attributes())))
            stack.callback(mounts.unmount, root)
        if strategy is model.Strategy.BIND:
            for each in names:
                mounts.bind_read_only(f"{store}/{each}", f"{root}/nix/store/{each}")
                stack.callback(mounts.unmount, f"{root}/nix/store/{each}")
        shown = os.path.join(root, "nix/store")
        same = look(shown) == look(store) if names else not os.listdir(shown)
    if not same:
        raise errors.UnsupportedError(f"a container would see wrong content over the store {store}")


def command(root: str, real_store_dir: str, overlay: model.Overlay = model.Overlay.KERNEL) -> list[str]:
    """The program that probes, as in ``findings``."""
    return process.python("nixlet.snapshots.probe", root, real_store_dir, overlay.value)


def main() -> None:
    """Probe in a mount namespace of this process's own, and print the findings as JSON."""
    root, real_store_dir, overlay = sys.argv[1:]
    mounts.unshare()
    answer: dict[str, object] = {"findings": {}, "passing": []}
    try:
        answer["findings"] = asyncio.run(probe(root, real_store_dir, model.Overlay(overlay)))
    except _PassingError as error:
        answer["passing"] = error.args
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
