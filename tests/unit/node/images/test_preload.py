"""The names of preloaded images, and what stands in lists."""

import asyncio
import logging
import types
from pathlib import Path

import msgspec
import pytest

from nixlet import errors
from nixlet.images import archive, opening, platforms
from nixlet.node.images import coredns, preload
from support import image_archives

DIGEST = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("names", "registries", "more"),
    [
        (["docker.io/library/a:1"], [], ["docker.io/library/a@D"]),
        (
            ["docker.io/library/a:1"],
            ["r.example"],
            ["docker.io/library/a@D", "r.example/library/a:1", "r.example/library/a@D"],
        ),
        (["docker.io/b/a:1"], ["r.example/x/"], ["docker.io/b/a@D", "r.example/x/b/a:1", "r.example/x/b/a@D"]),
        # It is there already; another registry whose name merely begins like that is not.
        (["r.example/a:1"], ["r.example"], ["r.example/a@D"]),
        (["r.example.org/a:1"], ["r.example"], ["r.example.org/a@D", "r.example/a:1", "r.example/a@D"]),
        (["r.example/x/a:1"], ["r.example/x"], ["r.example/x/a@D"]),
        (["r.example/xy/a:1"], ["r.example/x"], ["r.example/xy/a@D", "r.example/x/xy/a:1", "r.example/x/xy/a@D"]),
        # By digest alone.
        (["r.example/a@D"], ["s.example"], ["s.example/a@D"]),
        # Each name once, also where two names have one repository.
        (["r.example/a:1", "r.example/a:2"], [], ["r.example/a@D"]),
        (["nix:0/nix/store/0c0qxbrxlfz2nzi6jxz6a3ssa0cl6lrw-a.tar:latest"], ["r.example"], []),
        ([], ["r.example"], []),
    ],
)
def test_further_names(names: list[str], registries: list[str], more: list[str]) -> None:
    names, more = ([each.replace("@D", f"@{DIGEST}") for each in some] for some in (names, more))
    assert list(preload.further_names(names, DIGEST, registries)) == more


def test_a_list_of_references(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\n  a:1 \r\n\t\nb\xff\n" + b"c" * 65536)
    assert preload.references_in(str(path)) == ["a:1", "b\N{REPLACEMENT CHARACTER}", "c" * 65536]
    path.write_bytes(b"a:1\n" + b"c" * 65537)
    with pytest.raises(errors.InvalidArgumentError, match=r"list\.txt has a line of more than 65536 bytes"):
        preload.references_in(str(path))


class Loads:
    """A loader with a mistake, and one whose disk is full the first time."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    async def load(self, source: archive.Archive, _: archive.ArchiveImage, names: list[str], **__: object) -> object:
        name = names[0].rpartition("/")[2]
        self.begun.append(name)
        if name == "mistaken:1":
            raise RuntimeError("a mistake")
        if name == "full:1" and self.begun.count(name) == 1:
            raise errors.ResourceExhaustedError("no room", hint="make some")
        return types.SimpleNamespace(image_id="sha256:0")


class Shown:
    """CRI, which shows all images."""

    async def status(self, _: str) -> object:
        return types.SimpleNamespace(id="sha256:0")


class Records:
    """An image store without images."""

    async def image(self, _: str) -> None:
        return None

    async def create_image(self, *_: object) -> bool:
        return True


def made(directory: Path, loads: object, records: object, pulling: object = None) -> preload.Preload:
    opener = opening.Opener(str(directory))
    return preload.Preload(str(directory), loads, records, Shown(), opener, pulling, [])  # type: ignore[arg-type]  # what isn't asked


async def test_the_watch_outlives_mistakes_and_full_disks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("_INTERVAL", "_REST", "_RETRY", "_RETRY_FULL"):
        monkeypatch.setattr(preload, name, 0.001)
    caplog.set_level(logging.INFO)
    loads = Loads()
    watching = made(tmp_path, loads, Records())
    watch = asyncio.create_task(watching.watch())
    for name in ("mistaken", "full", "good"):
        data = image_archives.tar(image_archives.oci(name=f"localhost/{name}:1"))
        (tmp_path / f"{name}.tar").write_bytes(data)
    try:
        async with asyncio.timeout(30):
            while not all(f"imported {tmp_path}/{name}.tar" in caplog.text for name in ("good", "full")):
                assert not watch.done()
                await asyncio.sleep(0.01)
    finally:
        watch.cancel()
        await asyncio.wait([watch])
    assert sorted(loads.begun) == ["full:1", "full:1", "good:1", "mistaken:1"]
    assert f"{tmp_path}/mistaken.tar can't be imported" in caplog.text
    assert f"{tmp_path}/full.tar is imported later: no room" in caplog.text


class Vanishing:
    """An image store whose images somebody removes as soon as they were seen."""

    def __init__(self, digest: str, pinned: str, *others: str) -> None:
        self._digest = digest
        self._pinned = pinned
        self.names = {pinned, *others}
        self.made: list[str] = []

    async def images(self, _: str) -> list[object]:
        return [self._record(self._pinned)]

    async def image(self, name: str) -> object | None:
        return self._record(name) if name in self.names else None

    def _record(self, name: str) -> object:
        target = types.SimpleNamespace(digest=self._digest, media_type="", size=0)
        return types.SimpleNamespace(name=name, labels={}, target=target)

    async def label_image(self, record: types.SimpleNamespace, _: object) -> None:
        self.names.discard(record.name)
        raise errors.NotFoundError(f"{record.name} is gone")

    async def create_image(self, name: str, *_: object) -> bool:
        if name in self.names:
            return False
        self.made.append(name)
        return True


async def test_an_image_that_somebody_removes_meanwhile_is_imported_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It keeps no node from starting."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "good.tar"
    path.write_bytes(image_archives.tar(image_archives.oci(name="localhost/good:1")))
    status = path.stat()
    state = preload._State(status.st_size, status.st_mtime_ns, status.st_ino)
    known = {str(path): preload._Imported(state, ("localhost/good:1",))}
    (tmp_path / ".cache.json").write_bytes(msgspec.json.encode(known))
    with archive.open_archive(str(path)) as source:
        digest = source.image(platforms.host_platform()).descriptor.digest
    further = f"localhost/good@{digest}"
    loads, records = Loads(), Vanishing(digest, "localhost/old:1", "localhost/good:1", further)
    importing = made(tmp_path, loads, records)
    await importing.start()
    assert loads.begun == ["good:1"]
    assert (records.names, records.made) == (set(), [further])
    assert f"imported {path}: localhost/good:1, {further}" in caplog.text


async def test_what_failed_rests_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that took."""
    now = 1000.0
    monkeypatch.setattr(preload, "time", types.SimpleNamespace(monotonic=lambda: now))

    class Slow(Loads):
        async def load(self, *_: object, **__: object) -> object:
            nonlocal now
            now += 500
            raise errors.ResourceExhaustedError("no room")

    path = tmp_path / "full.tar"
    path.write_bytes(image_archives.tar(image_archives.oci(name="localhost/full:1")))
    watching = made(tmp_path, Slow(), Records())
    resting = await watching._look_again({})
    now += preload._REST
    resting = await watching._look_again(resting)
    ((_, ripe),) = resting.values()
    assert ripe == now + preload._RETRY_FULL


async def test_an_image_of_a_list_that_somebody_removes_meanwhile_is_pulled_again(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("localhost/good:1\n")
    records = Vanishing(DIGEST, "localhost/good:1")
    watching = made(tmp_path, Loads(), records, Shown())
    with pytest.raises(errors.UnavailableError, match="localhost/good:1 and perhaps others could not be pulled"):
        await watching._pull_list(str(tmp_path / "list.txt"))


async def test_an_image_of_an_earlier_program_that_a_kubelet_collects_meanwhile_is_in_nobodys_way() -> None:
    records = Vanishing(DIGEST, "localhost/nixlet/coredns:0")
    maker = coredns.Maker(None, None, records, None, "")  # type: ignore[arg-type]  # what isn't asked
    await maker._let_go("localhost/nixlet/coredns:1")
    assert records.names == set()
