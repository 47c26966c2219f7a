"""Hostile images through containerd: they read nothing outside their closure and break nothing for others."""

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from nixlet.images import archive as archive_module
from nixlet.images import platforms
from nixlet.store import closures
from support import image_archives, nixstore, nodes, storeimages

SECRET = "a secret of the host"
PREFIX = "containerd.io/snapshot"


@pytest.fixture
def secrets() -> Iterator[list[Path]]:
    """Two secrets that no image may read: a store path outside its closure, and a file of the host."""
    source = Path("/run/nixlet-test/secret")
    source.parent.mkdir(exist_ok=True)
    source.write_text(SECRET)
    argv = ["nix-store", "--add", str(source)]
    stored = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    yield [Path(stored), source]
    source.unlink()
    nixstore.delete(stored)


def entry(name: str, kind: bytes, link: str = "", **xattrs: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o755
    info.pax_headers = {f"SCHILY.xattr.{key.replace('_', '.')}": value for key, value in xattrs.items()}
    return info


def layer(entries: Sequence[tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as out:
        for info in entries:
            out.addfile(info, io.BytesIO(b"x" * info.size) if info.isreg() else None)
    return buffer.getvalue()


def traps(secret: Path) -> list[tarfile.TarInfo]:
    """Entries that would show a secret if anybody followed them on the host, or overlayfs took their attributes for its own."""
    name = secret.name
    made = [
        entry("trap", tarfile.DIRTYPE),
        entry("trap/d1", tarfile.DIRTYPE, trusted_overlay_redirect=f"/{name}", trusted_overlay_opaque="n"),
        entry("trap/d2", tarfile.DIRTYPE, trusted_overlay_redirect="/v/nix/store"),
        entry("trap/d3", tarfile.DIRTYPE, user_overlay_redirect=f"/nix/store/{name}"),
        entry("trap/d4", tarfile.DIRTYPE, trusted_overlay_origin="x"),
        entry("trap/f1", tarfile.REGTYPE, trusted_overlay_metacopy="", trusted_overlay_redirect=f"/{name}"),
        entry("trap/f2", tarfile.REGTYPE, user_overlay_metacopy="", user_overlay_redirect=f"/{name}"),
        entry("trap/l1", tarfile.SYMTYPE, str(secret)),
        entry("trap/l2", tarfile.SYMTYPE, "../" * 20 + str(secret).lstrip("/")),
        entry("trap/whiteout", tarfile.CHRTYPE),
        entry("trap/disk", tarfile.BLKTYPE),
        entry("nix", tarfile.DIRTYPE),
        entry("nix/store", tarfile.DIRTYPE, trusted_overlay_redirect="/", trusted_overlay_opaque="n"),
        entry(f"nix/store/{name}", tarfile.DIRTYPE, trusted_overlay_redirect=f"/{name}"),
    ]
    for info in made:
        if info.isreg():
            info.size = len(SECRET)
        info.devmajor, info.devminor = (8, 0) if info.type == tarfile.BLKTYPE else (0, 0)
    return made


def archive(path: Path, image: storeimages.StoreImage, below: bytes, above: bytes) -> Path:
    """A Nix layer with the image's closure between two others."""
    applets = os.listdir(f"{image.paths[0]}/bin")
    links = [entry("bin", tarfile.DIRTYPE)]
    links += [entry(f"bin/{name}", tarfile.SYMTYPE, f"{image.paths[0]}/bin/{name}") for name in applets]
    notes = {f"{PREFIX}/nix-layer": "true"}
    notes |= {f"{PREFIX}/nix-store-path.{number}": str(each) for number, each in enumerate(image.paths)}
    config = {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]}
    files = image_archives.oci([below, layer(links), above], name=None, annotations=[None, notes, None], config=config)
    path.write_bytes(image_archives.tar(files))
    return path


def test_attributes_links_and_devices_lead_nowhere(
    node: nodes.Node, secrets: list[Path], archives: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    image = store_images[50]
    trapped = archive(archives / "trapped.tar", image, layer(traps(secrets[0])), layer(traps(secrets[1])))
    # All that can be read, and what can't, is looked at.
    look = "cd /; find trap nix -type f -exec cat {} + 2>/dev/null; for l in trap/*; do cat $l; ls $l; done 2>/dev/null; echo; ls /nix/store"
    done = node.run("run", "--rm", f"nix:0{trapped}", "/bin/sh", "-c", look)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(errors="replace")
    assert SECRET not in text
    store = set(text.splitlines()[-len(image.paths) - 3 :]) & set(os.listdir("/nix/store"))
    # The closure is there, and of what the traps name the bare directories at most.
    assert {path.name for path in image.paths} <= store
    assert store <= {path.name for path in image.paths} | {secrets[0].name}
    trapped.unlink()


@pytest.mark.parametrize(
    "notes",
    [
        {f"{PREFIX}/nix-layer": "true"}
        | {f"{PREFIX}/nix-store-path.{number}": f"/nix/store/{number:032d}-x" for number in range(100_000)},
        {f"{PREFIX}/nix-closure": "/nix/store/" + "x" * (10 << 20)},
    ],
    ids=["100,000 annotations", "one of 10 MB"],
)
def test_too_many_or_too_large_annotations(
    any_node: nodes.Node, archives: Path, hello: str, notes: dict[str, str]
) -> None:
    def resident() -> int:
        (line,) = [each for each in Path(f"/proc/{any_node.pid}/status").read_text().splitlines() if "VmRSS" in each]
        return int(line.split()[1]) >> 10

    any_node.ok("run", "--rm", hello)
    before = resident()
    files = image_archives.oci([layer([])], name=None, annotations=[notes])
    path = archives / "large.tar"
    path.write_bytes(image_archives.tar(files))
    done = any_node.run("run", "--rm", f"nix:0{path}")
    assert done.returncode == 125
    assert done.stderr.decode().count("error: ") == 1
    assert b"Traceback" not in done.stderr
    assert len(done.stderr) < 2000
    # Others don't notice, and what it took was given back but for what Python keeps.
    assert any_node.ok("run", "--rm", hello) == "Hello, world!\n"
    assert resident() - before < 150
    assert json.loads(any_node.ok("images", "--output", "json")) is not None
    path.unlink()


def test_an_archive_that_is_pulled_gives_itself_no_name(any_node: nodes.Node, archives: Path) -> None:
    """Else the next pod with imagePullPolicy IfNotPresent would run it in another image's place."""
    digest = f"sha256:{'0' * 64}"
    names = ["docker.io/library/nginx:1.27", f"registry.k8s.io/x@{digest}"]
    manifest, blobs = image_archives.image([layer([])])
    index = image_archives.index_json(*(image_archives.entry(manifest, name) for name in names))
    path = archives / "named.tar"
    path.write_bytes(image_archives.tar({"oci-layout": b"{}", "index.json": index, **blobs}))
    any_node.crictl("pull", f"nix:0{path}")
    (shown,) = [
        image for image in json.loads(any_node.crictl("images", "-o", "json"))["images"] if str(path) in str(image)
    ]
    assert shown["repoTags"] == [f"nix:0{path}:latest"]
    assert shown["repoDigests"] == []
    listed = any_node.ok("ctr", "images", "ls", "-q").split()
    assert not set(names) & set(listed)
    any_node.crictl("rmi", shown["id"])
    path.unlink()


def test_layers_of_equal_content_never_have_anothers_closure(
    node: nodes.Node, archives: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    image = store_images[50]
    with archive_module.open_archive(str(image.archive)) as source:
        (own,) = source.image(platforms.host_platform()).layers
    # The same paths, by two forms; and others.
    by_info = dict(own.descriptor.annotations or {})
    by_paths = closures.ClosureReference(None, tuple(image.paths)).annotations()
    other = closures.ClosureReference(None, tuple(image.paths[:2])).annotations()

    def made(name: str, notes: dict[str, str] | None) -> str:
        files = image_archives.oci(
            [image_archives.tar({"the-same": b""})], name=None, annotations=[notes], config={"Labels": {"name": name}}
        )
        (archives / f"{name}.tar").write_bytes(image_archives.tar(files))
        return f"nix:0{archives}/{name}.tar"

    first = made("first", by_info)
    node.crictl("pull", first)
    node.crictl("pull", made("equal", by_paths))
    for name, notes, said in (("other", other, "a closure of 2 paths"), ("none", None, "no closure")):
        done = node.run("run", "--rm", made(name, notes))
        assert done.returncode == 125
        assert (
            f"can't be loaded with {said}: nix:0{archives}/equal.tar:latest, {first}:latest has" in done.stderr.decode()
        )
        assert " the same layer with the closure /nix/store/" in done.stderr.decode()
    for name in ("first", "equal"):
        node.crictl("rmi", f"nix:0{archives}/{name}.tar")
    # When nobody has it any more, it is whoever's comes next; an image without a closure doesn't get one from others.
    node.ok("ctr", "leases", "create", "--id", "test")
    node.ok("ctr", "leases", "delete", "--sync", "test")
    node.crictl("pull", f"nix:0{archives}/none.tar")
    done = node.run("run", "--rm", f"nix:0{archives}/other.tar")
    assert f"{archives}/none.tar:latest has the same layer with no closure" in done.stderr.decode()
    node.crictl("rmi", f"nix:0{archives}/none.tar")
    node.crictl("pull", f"nix:0{archives}/other.tar")
    node.crictl("rmi", f"nix:0{archives}/other.tar")
    for name in ("first", "equal", "other", "none"):
        (archives / f"{name}.tar").unlink()


def test_a_layer_that_others_unpacked_without_its_closure_gets_it(
    node: nodes.Node, archives: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    """ctr's older versions pass no annotations on; a container would see none of its store paths."""
    image = store_images[50]
    notes = closures.ClosureReference(None, tuple(image.paths)).annotations()
    config = {"Cmd": [f"{image.paths[0]}/bin/echo", "mended"]}
    files = image_archives.oci(
        [image_archives.tar({"mended": b""})], name="localhost/mended:1", annotations=[notes], config=config
    )
    path = archives / "mended.tar"
    path.write_bytes(image_archives.tar(files))
    node.ok("ctr", "images", "import", "--snapshotter", "nix", str(path))
    assert node.ok("run", "--rm", f"nix:0{path}") == "mended\n"
    node.crictl("rmi", f"nix:0{path}")
    path.unlink()
