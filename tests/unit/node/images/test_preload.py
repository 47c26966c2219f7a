"""The names of preloaded images, and what stands in lists."""

import asyncio
import logging
import types
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.images import archive, opening
from nixlet.node.images import preload
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


async def test_the_watch_outlives_mistakes_and_full_disks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("_INTERVAL", "_REST", "_RETRY", "_RETRY_FULL"):
        monkeypatch.setattr(preload, name, 0.001)
    caplog.set_level(logging.INFO)
    loads, opener = Loads(), opening.Opener(str(tmp_path))
    watching = preload.Preload(str(tmp_path), loads, Records(), Shown(), opener, None, [])  # type: ignore[arg-type]  # what isn't asked
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
