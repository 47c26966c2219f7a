"""Store paths that are deleted, brought back, repaired and collected under a running node.

Every container sees its closure whole, or its start is refused by the name of a path that is missing.
``NIXLET_ROUNDS=500`` makes it long, with 20 containers at a time.
"""

import contextlib
import fcntl
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import nixstore, nodes, storeimages

ROUNDS = int(os.environ.get("NIXLET_ROUNDS", "24"))
CONTAINERS = 20 if ROUNDS > 100 else 6

#: Prints all that a closure consists of: the names, and a word of each.
LOOK = "ls /nix/store; cat /nix/store/*-package-*/share/number /nix/store/*-plain-file.txt; readlink /nix/store/*-link"


class Change:
    """A node, images with closures of this test's own, and what is done to them.

    Attributes:
        gone: Store paths that are not on the disk, though Nix believes them valid.
        running: Containers: their images, and the paths that were deleted while they ran.
        refused: How many starts were refused.
        collected: How many paths were collected, and fetched again.
    """

    def __init__(self, node: nodes.Node, directory: Path, archives: Path, seed: int) -> None:
        self.node = node
        self.random = random.Random(seed)
        self.salt = f"-{os.urandom(6).hex()}"
        self.images = [storeimages.make(archives, count, salt=self.salt) for count in (6, 9, 12)]
        self.paths: list[str] = sorted({path for image in self.images for path in image.paths})
        self.cache = directory / "cache"
        everything = [*self.paths, *(image.info for image in self.images)]
        nix = ("nix", "--extra-experimental-features", "nix-command")
        self._nix(*nix, "copy", "--to", f"file://{self.cache}", *everything)
        # What was collected, a pull fetches again; what Nix believes valid it fetches from nowhere.
        node.environment["NIX_CONFIG"] = f"substituters = file://{self.cache}\nrequire-sigs = false"
        self.copies = directory / "copies"
        self.copies.mkdir()
        for path in self.paths:
            subprocess.run(["cp", "-a", path, self.copies], check=True)
        self.gone: set[str] = set()
        self.running: dict[str, tuple[storeimages.StoreImage, set[str]]] = {}
        self.refused = self.started = self.collected = 0

    @staticmethod
    def _nix(*argv: str) -> str:
        environment = {**os.environ, "NIX_CONFIG": "substituters ="}
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def expected(self, image: storeimages.StoreImage) -> str:
        names = sorted(path.name for path in image.paths)
        packages = [path for path in sorted(image.paths) if "-package-" in path]
        words = [(self.copies / os.path.basename(path) / "share/number").read_text() for path in packages]
        file = (self.copies / os.path.basename(image.file)).read_text()
        # Between two containers a closureInfo is seen by none: it isn't part of what it lists.
        return "".join(f"{name}\n" for name in names) + "".join(words) + file + image.file + "\n"

    # What a round may do.

    def create(self) -> None:
        if len(self.running) == CONTAINERS:
            self.remove()
        self.create_from(self.random.choice(self.images))

    def create_from(self, image: storeimages.StoreImage) -> None:
        name = f"c{self.started}"
        self.started += 1
        done = self.node.run("run", "-d", "--name", name, image.reference, "--", "/bin/sleep", "100000")
        missing = self.gone & set(image.paths)
        if missing:
            assert done.returncode == 125, f"{name} started without {missing}: {done.stdout!r}"
            told = done.stderr.decode()
            assert any(f"the store path {path} is missing" in told for path in missing), told
            assert "nix-store --repair-path" in told
            self.refused += 1
            return
        assert done.returncode == 0, done.stderr.decode()
        self.running[name] = (image, set())
        self.check(name)

    def check(self, name: str) -> None:
        image, lost = self.running[name]
        if not lost & set(image.paths):
            seen = self.node.ok("exec", name, "--", "/bin/sh", "-c", LOOK)
            assert seen == self.expected(image), name

    def check_any(self) -> None:
        if self.running:
            self.check(self.random.choice(sorted(self.running)))

    def kill(self) -> None:
        if self.running:
            name = self.random.choice(sorted(self.running))
            self.node.ok("stop", "-t", "0", name)
            self.node.ok("rm", name)
            del self.running[name]

    def remove(self) -> None:
        if self.running:
            name = self.random.choice(sorted(self.running))
            self.node.ok("rm", "-f", name)
            del self.running[name]

    def delete(self) -> None:
        """By force, as no collector does it."""
        here = sorted(set(self.paths) - self.gone)
        if len(self.gone) < 2 and here:
            path = self.random.choice(here)
            subprocess.run(["rm", "-rf", path], check=True)
            self.gone.add(path)
            self._lost(path)

    def _lost(self, path: str) -> None:
        for _, lost in self.running.values():
            lost.add(path)

    def bring_back(self) -> None:
        """By hand, or as Nix does it."""
        if self.gone:
            path = self.random.choice(sorted(self.gone))
            if self.random.random() < 0.5:
                self._copy(path)
            else:
                self._repair(path)
            self.gone.discard(path)

    def _copy(self, path: str) -> None:
        beside = f"{path}.nixlet-test"
        subprocess.run(["cp", "-aT", self.copies / os.path.basename(path), beside], check=True)
        os.rename(beside, path)

    def _repair(self, path: str) -> None:
        options = ("--option", "substituters", f"file://{self.cache}", "--option", "require-sigs", "false")
        self._nix("nix-store", "--repair-path", path, *options)

    def repair_corrupt(self) -> None:
        """Nix replaces a path whose content isn't what it was, however a file system numbers the new one."""
        packages = [path for path in self.paths if "-package-" in path and path not in self.gone]
        path = self.random.choice(packages)
        file = Path(path, "share", "number")
        file.chmod(0o644)
        file.write_text("corrupt\n")
        self._lost(path)
        self._repair(path)

    def replace(self) -> None:
        """With an equal one, while those that run keep the one that they have."""
        here = [path for path in self.paths if path not in self.gone]
        path = self.random.choice(here)
        aside = f"{path}.nixlet-aside-{time.monotonic_ns()}"
        os.rename(path, aside)
        self._copy(path)

    def collect(self) -> None:
        """Nix deletes what nothing needs, and no path of an image that is there."""
        for path in self.random.sample(self.paths, 2):
            if path not in self.gone and any(path in image.paths for image, _ in self.running.values()):
                done = subprocess.run(["nix-store", "--delete", path], capture_output=True, text=True, check=False)
                assert done.returncode != 0, f"{path} was not rooted"
                assert "still alive" in done.stderr

    def collect_image(self) -> None:
        """An image is removed, Nix deletes what was its alone, and the next container has it fetched again."""
        image = self.images[-1]
        while self.gone:
            self.bring_back()
        for name in [name for name, (theirs, _) in self.running.items() if theirs is image]:
            self.node.ok("rm", "-f", name)
            del self.running[name]
        self.node.crictl("pull", image.reference)
        self.node.crictl("rmi", image.reference)
        shared = {path for other in self.images if other is not image for path in other.paths}
        own = [image.info, *sorted(set(image.paths) - shared)]
        # The root goes a little after the image, and what a connection to Nix holds after that.
        nixstore.delete(*own)
        assert not any(map(os.path.lexists, own))
        self.collected += len(own)
        self.create_from(image)
        assert all(map(os.path.lexists, own))

    def restart(self) -> None:
        """The node is killed and started again."""
        self.node.kill()
        self.node.start()

    def clean_up(self) -> None:
        for path in self.paths:
            for left in Path("/nix/store").glob(f"{os.path.basename(path)}.nixlet-*"):
                subprocess.run(["rm", "-rf", str(left)], check=False)
        # In the order of who refers to whom; Nix forgets those as well that are not on the disk.
        doomed = [*(image.info for image in self.images), self.images[0].link, *self.paths]
        subprocess.run(["nix-store", "--delete", "--ignore-liveness", *doomed], capture_output=True, check=False)


@pytest.fixture
def change(tmp_path: Path, archives: Path) -> Iterator[Change]:
    node = nodes.Node(36, tmp_path)
    with contextlib.ExitStack() as stack, nodes.cleaned_up(node):
        made = Change(node, tmp_path, archives, seed=int(os.environ.get("NIXLET_SEED", "1")))
        stack.callback(made.clean_up)
        node.start()
        yield made


@pytest.mark.slow
def test_an_image_that_is_there_starts_while_nix_does_not_answer(
    tmp_path: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    """As in a long garbage collection: nobody asks Nix for what is rooted and on the disk."""
    node = nodes.Node(36, tmp_path)
    with nodes.cleaned_up(node), socket.socket(socket.AF_UNIX) as silent:
        node.start()
        node.ok("run", "--rm", store_images[50].reference, "--", "/bin/true")
        node.stop()
        silent.bind(str(tmp_path / "nix"))
        silent.listen()
        silent.setblocking(False)
        state = tmp_path / "state"
        state.mkdir()
        node.environment |= {"NIX_DAEMON_SOCKET_PATH": str(tmp_path / "nix"), "NIX_STATE_DIR": str(state)}
        with (state / "gc.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            node.start()
            assert f"does not answer yet: process {os.getpid()} holds {state}/gc.lock" in node.log.read_text()
            with contextlib.suppress(BlockingIOError):
                while True:
                    silent.accept()[0].close()
            seen = node.ok("run", "--rm", store_images[50].reference, "--", "/bin/sh", "-c", LOOK)
            assert seen.count("-package-") == 47
            with pytest.raises(BlockingIOError):
                silent.accept()
        node.stop()


@pytest.mark.slow
@pytest.mark.timeout(120 + 8 * ROUNDS)
def test_every_container_sees_its_closure_whole_or_is_refused(change: Change) -> None:
    actions = [*((change.create,) * 8), *((change.bring_back, change.check_any) * 3)]
    actions += [change.delete, change.kill, change.remove, change.repair_corrupt, change.replace, change.collect]
    actions += [change.collect_image]
    # Each once, in an order in which each has something to do; then by chance.
    first = [change.create] * (CONTAINERS - 2)
    first += [change.delete, change.create, change.create, change.create, change.bring_back, change.create]
    first += [change.repair_corrupt, change.create, change.replace, change.create, change.collect, change.restart]
    first += [change.collect_image, change.create]
    for number in range(ROUNDS):
        action = first[number] if number < len(first) else change.random.choice(actions)
        if number % 100 == 99:
            action = change.restart
        action()
    while change.gone:
        change.bring_back()
    for image in change.images:
        assert change.node.ok("run", "--rm", image.reference, "--", "/bin/sh", "-c", LOOK) == change.expected(image)
    for name in change.running:
        change.check(name)
    print(
        f"{ROUNDS} rounds: {change.started} starts, {change.refused} refused by name, {change.collected} paths collected"
    )
