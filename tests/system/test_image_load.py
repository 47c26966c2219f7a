"""`nixlet image load`: what a containerd has afterwards is what its own ctr would have imported."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import alone, nodes, parts, storeimages
from support import image_archives as made

ZSTD = made.COMPRESSIONS["zst"]


def typed(layer: bytes, kind: str) -> tuple[bytes, made.Files]:
    """An image of one layer that is packed with zstd, by some name for that."""
    packed = ZSTD(layer)
    manifest, blobs = made.image([layer])
    text = json.dumps({**json.loads(manifest), "layers": [made.descriptor(kind, packed)]}).encode()
    return text, {**blobs, made.blob(text): text, made.blob(packed): packed}


@pytest.fixture(scope="module", params=["1.6.20", parts.CONTAINERDS[-1]])
def ctr(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A containerd that is nobody's; the command line of its ctr, whose second argument is the socket."""
    version: str = request.param
    with (
        alone.cleaned_up(46, tmp_path_factory.mktemp(f"load-{version}")) as place,
        place.containerd(version) as command,
    ):
        yield command


def images(ctr: list[str], namespace: str) -> dict[str, str]:
    """Names and the digests of what they name."""
    argv = [*ctr, "-n", namespace, "images", "list"]
    listed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    return {fields[0]: fields[2] for fields in map(str.split, listed)}


def test_an_archive_of_many_kinds_through_a_pipe(ctr: list[str], tmp_path: Path) -> None:
    """Images with and without names, all names of a packed layer, other processors, an artifact: each as ctr takes it."""
    plain, nameless = made.image([made.tar({"a": b"1"})]), made.image([made.tar({"b": b"2"})])
    old = made.image([made.tar({"c": b"3"})], architecture="386")
    docker = typed(made.tar({"d": b"4"}), "application/vnd.docker.image.rootfs.diff.tar.zstd")
    oci = typed(made.tar({"e": b"5"}), "application/vnd.oci.image.layer.v1.tar+zstd")
    vague = typed(made.tar({"f": b"6"}), "application/vnd.docker.image.rootfs.diff.tar")
    index = made.index_json(
        made.entry(plain[0], "localhost/plain:1"),
        made.entry(nameless[0]),
        made.entry(old[0], "localhost/old:1"),
        made.entry(docker[0], "localhost/docker:1"),
        made.entry(oci[0], "localhost/oci:1"),
        made.entry(vague[0], "localhost/vague:1"),
        made.entry(b"no image", "localhost/artifact:1", artifactType="application/vnd.example"),
    )
    artifact = json.dumps(
        {
            "schemaVersion": 2,
            "artifactType": "application/vnd.example",
            "config": made.descriptor("application/vnd.oci.empty.v1+json", b"{}"),
            "layers": [made.descriptor("application/vnd.example", b"x")],
        }
    ).encode()
    index = index.replace(made.digest(b"no image").encode(), made.digest(artifact).encode()).replace(
        b'"size": 8', b'"size": %d' % len(artifact)
    )
    blobs = plain[1] | nameless[1] | old[1] | docker[1] | oci[1] | vague[1]
    blobs |= {made.blob(each): each for each in (artifact, b"{}", b"x")}
    data = made.tar({"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": index, **blobs})

    argv = [sys.executable, "-m", "nixlet", "image", "load", "--address", ctr[2], "--snapshotter", "native"]
    # As it comes from docker save or skopeo copy, perhaps over ssh; once more finds all there.
    first, again = (
        subprocess.run([*argv, "--namespace", "ours", *more], input=data, capture_output=True, check=False)
        for more in (["-"], [])
    )
    assert (first.returncode, again.returncode) == (0, 0), (first.stderr + again.stderr).decode()
    ours = images(ctr, "ours")
    assert sorted(first.stdout.decode().split()) == sorted(again.stdout.decode().split()) == sorted(ours)

    (tmp_path / "image.tar").write_bytes(data)
    usage = subprocess.run([*ctr, "images", "import", "-h"], capture_output=True, text=True, check=True).stdout
    local = ["--local"] if "--local" in usage else []
    # Its own ctr can't unpack all of this, but says what the images are.
    importing = [
        *ctr,
        "-n",
        "theirs",
        "images",
        "import",
        *local,
        "--no-unpack",
        "--digests",
        "--base-name",
        "localhost/import",
    ]
    subprocess.run([*importing, str(tmp_path / "image.tar")], check=True, capture_output=True)
    theirs = images(ctr, "theirs")
    assert ours.items() <= theirs.items()
    assert set(ours.values()) == set(theirs.values()) - {made.digest(artifact)}


def test_several_images_have_no_one_name(ctr: list[str]) -> None:
    one, two = made.image([made.tar({"a": b"1"})]), made.image([made.tar({"b": b"2"})])
    data = made.tar({"index.json": made.index_json(made.entry(one[0]), made.entry(two[0])), **one[1], **two[1]})
    argv = [sys.executable, "-m", "nixlet", "image", "load", "--address", ctr[2], "--snapshotter", "native"]
    done = subprocess.run([*argv, "--ref", "a:1"], input=data, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (125, b"")
    assert done.stderr.decode() == (
        "error: --ref names one image, and standard input holds 2\nhint: load them without it\n"
    )


def test_what_was_loaded_before_an_error_is_told(ctr: list[str], tmp_path: Path) -> None:
    """In an archive whose path is no name, and under names that are not all its own."""
    first, second = made.image([made.tar({"a": b"1"})]), made.image([b"no tar file"])
    index = made.index_json(made.entry(first[0], "localhost/told:1"), made.entry(second[0], "localhost/never:1"))
    path = tmp_path / "a:b.tar"
    path.write_bytes(made.tar({"index.json": index, **first[1], **second[1]}))
    argv = [sys.executable, "-m", "nixlet", "image", "load", "--address", ctr[2], "--snapshotter", "native"]
    done = subprocess.run([*argv, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (125, "localhost/told:1\n")
    path.write_bytes(made.tar(made.oci([made.tar({"a": b"2"})], name="nix:0/tmp/others.tar")))
    for more, name in ([], "localhost/import@"), (["--ref", "localhost/given:1"], "localhost/given:1"):
        done = subprocess.run([*argv, *more, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(name)
    assert "nix:0/tmp/others.tar:latest" not in images(ctr, "k8s.io")


def test_the_node_loads_what_it_is_handed(any_node: nodes.Node, tmp_path: Path) -> None:
    """From a pipe, the rest of a file, and a file that is read only by its descriptor; what was loaded before an error is told."""
    first, second = made.image([made.tar({"a": b"1"})]), made.image([b"no tar file"])
    index = made.index_json(made.entry(first[0], "localhost/handed:1"), made.entry(second[0], "localhost/never:1"))
    data = made.tar({"index.json": index, **first[1], **second[1]})
    done = any_node.run("image", "load", stdin=data)
    assert (done.returncode, done.stdout) == (125, b"localhost/handed:1\n"), done.stderr
    path = tmp_path / "image.tar"
    path.write_bytes(b"before" + made.tar(made.oci([made.tar({"b": b"1"})], name="localhost/rest:1")))
    argv = [sys.executable, "-m", "nixlet", "image", "load"]
    with path.open("rb") as file:
        file.seek(6)
        assert subprocess.check_output(argv, env=any_node.environment, stdin=file) == b"localhost/rest:1\n"
    (tmp_path / "link.tar").symlink_to(path)
    manifest, blobs = made.image([made.tar({"c": b"1"})])
    path.write_bytes(made.tar({"index.json": made.index_json(made.entry(manifest)), **blobs}))
    assert any_node.ok("image", "load", str(tmp_path / "link.tar")) == f"nix:0{tmp_path}/link.tar:latest\n"


def test_a_load_ends_with_whoever_asked_for_it(any_node: nodes.Node) -> None:
    """Also while the pipe that it comes from brings nothing."""

    def held() -> int:
        return len(os.listdir(f"/proc/{any_node.pid}/fd"))

    any_node.ok("version")
    before = held()
    reading, writing = os.pipe()
    try:
        argv = [sys.executable, "-m", "nixlet", "image", "load"]
        with subprocess.Popen(argv, env=any_node.environment, stdin=reading) as process:
            nodes.until(lambda: held() > before + 1, "the node has the pipe")
            process.kill()
        nodes.until(lambda: held() <= before, "the node has let go of it")
    finally:
        os.close(reading)
        os.close(writing)


def test_an_image_of_store_paths_needs_the_nix_snapshotter(
    any_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]
) -> None:
    """Also where another snapshotter is named: what was loaded so could not run."""
    path = store_images[50].reference.removeprefix("nix:0")
    done = any_node.run("image", "load", "--snapshotter", "overlayfs", "--ref", "localhost/closure:1", path)
    assert done.returncode == 125
    assert b"which the snapshotter overlayfs can't run" in done.stderr


def test_images_without_names_are_listed_and_run_by_what_was_printed(
    any_node: nodes.Node, busybox_layer: bytes
) -> None:
    made_images = [
        made.image([busybox_layer], config={"Cmd": ["/bin/echo", word]}, architecture=architecture)
        for word, architecture in (("one", "amd64"), ("two", "amd64"), ("three", "386"))
    ]
    index = made.index_json(
        *(made.entry(manifest, name) for (manifest, _), name in zip(made_images, (None, None, "c:3"), strict=True))
    )
    blobs = {place: data for _, each in made_images for place, data in each.items()}
    names = any_node.ok("image", "load", stdin=made.tar({"index.json": index, **blobs})).split()
    assert names == [
        *(f"localhost/import@{made.digest(manifest)}" for manifest, _ in made_images[:2]),
        "docker.io/library/c:3",
    ]
    assert set(names) <= {line.split()[0] for line in any_node.ok("images").splitlines()}
    assert [any_node.ok("run", "--rm", name) for name in names] == ["one\n", "two\n", "three\n"]
