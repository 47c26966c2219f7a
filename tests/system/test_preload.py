"""Images in the node's directory: there before it is ready, pinned, under further names, and again when they change."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import image_archives, nodes, parts, registries, storeimages

pytestmark = pytest.mark.slow

NAME = "localhost/ordinary:1"
#: Where a registry comes to be.
PORT = 15037


@pytest.fixture
def own(version: str, tmp_path: Path) -> Iterator[nodes.Node]:
    """A node that is not started yet, with its directory for images."""
    made = nodes.Node(33, tmp_path, "--containerd", str(parts.containerd(version)))
    directory_of(made).mkdir(parents=True)
    with nodes.cleaned_up(made):
        yield made


def directory_of(node: nodes.Node) -> Path:
    return node.data_dir / "agent/images"


def shown(node: nodes.Node) -> dict[str, bool]:
    """The names of the node's images, and whether they are pinned."""
    found = {}
    for image in json.loads(node.crictl("images", "-o", "json"))["images"]:
        for name in [*image["repoTags"], *image["repoDigests"]]:
            found[name] = image.get("pinned", False)
    return found


def until_shown(node: nodes.Node, name: str) -> None:
    deadline = time.monotonic() + 30
    while name not in shown(node):
        assert time.monotonic() < deadline, node.log.read_text()
        time.sleep(0.1)


def until_said(node: nodes.Node, text: str, times: int = 1) -> None:
    deadline = time.monotonic() + 30
    while node.log.read_text().count(text) < times:
        assert time.monotonic() < deadline, node.log.read_text()
        time.sleep(0.1)


@pytest.mark.parametrize("version", parts.CONTAINERD_PARAMETERS)
def test_images_are_there_when_the_node_is_ready(
    own: nodes.Node, ordinary: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    directory = directory_of(own)
    (directory / "ordinary.tar.zst").write_bytes(image_archives.COMPRESSIONS["zst"](ordinary.read_bytes()))
    (directory / "list.txt").write_text(f"\n  {store_images[50].reference}  \n\n")
    own.arguments += ["--airgap-extra-registry", "mirror.example/all/", "--system-default-registry", "own.example"]
    own.start()
    (digest,) = [name.partition("@")[2] for name in shown(own) if name.startswith("localhost/ordinary@")]
    bases = ("localhost/ordinary", "mirror.example/all/ordinary", "own.example/ordinary")
    names = [*(f"{base}:1" for base in bases), *(f"{base}@{digest}" for base in bases)]
    assert set(names) <= set(shown(own))
    nix = f"{store_images[50].reference}:latest"
    assert all(shown(own)[name] for name in [*names, nix])
    assert own.ok("run", "--rm", names[1], "--", "/bin/echo", "an image").strip() == "an image"
    assert own.ok("run", "--rm", store_images[50].reference, "--", "/bin/echo", "store paths").strip() == "store paths"

    # What isn't there any more is kept, but not for ever.
    assert own.stop() == 0
    shutil.rmtree(directory)
    own.start()
    assert not any(shown(own)[name] for name in [*names, nix])


@pytest.mark.parametrize("version", parts.CONTAINERDS[-1:])
def test_what_appears_later_is_imported(own: nodes.Node, ordinary: Path, tmp_path: Path) -> None:
    own.start()
    before = own.log.read_text()
    assert "imported" not in before
    below = directory_of(own) / "a/b"
    below.mkdir(parents=True)
    for form, pack in image_archives.COMPRESSIONS.items():
        layer = image_archives.tar({"form": form.encode()})
        data = image_archives.tar(image_archives.oci([layer], name=f"localhost/{form}:1"))
        elsewhere = tmp_path / f"elsewhere.tar.{form}"
        elsewhere.write_bytes(pack(data))
        # As NixOS has it: a link to a file in the store.
        (below / elsewhere.name).symlink_to(elsewhere)
    for form in image_archives.COMPRESSIONS:
        until_shown(own, f"localhost/{form}:1")
    # The name goes to what the link leads to now, be it as old and as large as what was there.
    changed = tmp_path / "changed.tar.gz"
    layer = image_archives.tar({"form": b"zg"})
    changed.write_bytes(
        image_archives.COMPRESSIONS["gz"](image_archives.tar(image_archives.oci([layer], name="localhost/gz:1")))
    )
    old = tmp_path / "elsewhere.tar.gz"
    size = max(old.stat().st_size, changed.stat().st_size)
    for path in (old, changed):
        # Zeros behind a gzip file mean nothing.
        os.truncate(path, size)
        os.utime(path, (1, 1))
    until_said(own, f"imported {below}/{old.name}: localhost/gz:1, ", times=2)
    (below / old.name).unlink()
    (below / old.name).symlink_to(changed)
    until_said(own, f"imported {below}/{old.name}: localhost/gz:1, ", times=3)
    digests = [name for name in shown(own) if name.startswith("localhost/gz@")]
    assert len(digests) == 2


@pytest.mark.parametrize("version", parts.CONTAINERDS[-1:])
def test_an_image_without_a_name_has_that_of_its_file(own: nodes.Node) -> None:
    path = directory_of(own) / "nameless.tar"
    path.write_bytes(image_archives.tar(image_archives.oci([image_archives.tar({"a": b""})], name=None)))
    own.start()
    assert f"nix:0{path}:latest" in shown(own)


@pytest.mark.parametrize("version", parts.CONTAINERDS[-1:])
def test_what_cant_be_imported_is_said_and_left_out(own: nodes.Node, ordinary: Path) -> None:
    directory = directory_of(own)
    (directory / "damaged.tar.gz").write_bytes(image_archives.COMPRESSIONS["gz"](ordinary.read_bytes())[:-1000])
    shutil.copy(ordinary, directory / "everyones.tar")
    (directory / "everyones.tar").chmod(0o666)
    (directory / "odd.txt").write_text("UPPER\nnix:0/tmp/nothing.tar\n" + NAME)
    (directory / "long.txt").write_text("x" * 65537)
    (directory / "unheard.of").write_text("not looked at")
    shutil.copy(ordinary, directory / "zz.tar")
    own.start()
    # The list comes before the archive, which has the image; its registry may yet come to be there.
    assert NAME in shown(own)
    said = own.log.read_text()
    for text in (
        f"{directory}/damaged.tar.gz can't be imported: the image archive {directory}/damaged.tar.gz ends too early",
        f"{directory}/everyones.tar can't be imported: {directory}/everyones.tar can be written by everyone",
        f"{directory}/odd.txt: UPPER can't be pulled: ",
        f"{directory}/odd.txt: nix:0/tmp/nothing.tar can't be pulled: there is no image archive /tmp/nothing.tar",
        f"{directory}/odd.txt is imported later: {NAME} and perhaps others could not be pulled",
        f"{directory}/long.txt can't be imported: {directory}/long.txt has a line of more than 65536 bytes",
    ):
        assert text in said
    assert "unheard" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("version", parts.CONTAINERDS[-1:])
def test_a_list_is_tried_again_when_the_registry_is_there(own: nodes.Node, ordinary: Path, tmp_path: Path) -> None:
    """What has no name at all in it, and what comes after, are no reason to leave the rest out."""
    name = f"127.0.0.1:{PORT}/late:1"
    file = directory_of(own) / "list.txt"
    file.write_text(f"{name}\nUPPER\n")
    own.start()
    until_said(own, f"{file} is imported later: {name} and perhaps others could not be pulled")
    with registries.running(tmp_path / "registry", PORT) as registry:
        registry.push(ordinary, "late:1")
        until_shown(own, name)


@pytest.mark.parametrize("version", parts.CONTAINERDS[-1:])
def test_the_cache_spares_what_has_not_changed(own: nodes.Node, ordinary: Path) -> None:
    archive = directory_of(own) / "ordinary.tar"
    cache = directory_of(own) / ".cache.json"
    shutil.copy(ordinary, archive)
    cache.touch()
    own.start()
    until_said(own, f"imported {archive}: {NAME}")
    assert list(json.loads(cache.read_text())) == [str(archive)]

    def started_again() -> str:
        """What a next start says."""
        assert own.stop() == 0
        length = len(own.log.read_text())
        own.start()
        return own.log.read_text()[length:]

    assert f"the images of {archive} are there" in started_again()
    assert shown(own)[NAME] is True
    # Somebody removed the image: the cache doesn't hold what containerd hasn't.
    own.crictl("rmi", NAME)
    assert f"imported {archive}: " in started_again()
    cache.write_text("[")
    said = started_again()
    assert f"{cache} is begun anew" in said
    assert f"imported {archive}: " in said
    archive.unlink()
    started_again()
    assert json.loads(cache.read_text()) == {}
    assert shown(own)[NAME] is False
