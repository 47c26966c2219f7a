"""Image archives of every form that tools write."""

import gzip
import json
import os
import subprocess
import tarfile
import tempfile
import threading
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.images import archive, model
from support import image_archives as made

AMD64 = model.Platform("amd64", "linux")
ARM64 = model.Platform("arm64", "linux", "v8")


def write(directory: Path, data: bytes) -> str:
    (directory / "image.tar").write_bytes(data)
    return str(directory / "image.tar")


def contents(source: archive.Archive, image: archive.ArchiveImage) -> list[bytes]:
    """The layers' blobs, unpacked."""
    found = []
    for layer in image.layers:
        with source.open_blob(layer.descriptor.digest) as blob:
            data = blob.read()
        assert len(data) == layer.descriptor.size
        plain = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        assert made.digest(plain) == layer.diff_id
        found.append(plain)
    return found


@pytest.mark.parametrize("by_fd", [False, True])
@pytest.mark.parametrize("form", [None, *made.COMPRESSIONS])
def test_an_oci_layout(tmp_path: Path, form: str | None, *, by_fd: bool) -> None:
    notes = {"containerd.io/snapshot/nix-closure": "/nix/store/x"}
    data = made.tar(made.oci([b"one", b"two"], annotations=[None, notes], config={"Cmd": ["sh"]}))
    path = write(tmp_path, made.COMPRESSIONS[form](data) if form else data)
    with open(path, "rb") as file, archive.open_archive(file.fileno() if by_fd else path, label="it") as source:
        image = source.image(AMD64)
        assert image.names == ("docker.io/library/a:1",)
        assert image.config.config == model.ContainerConfig(cmd=["sh"])
        assert [layer.descriptor.annotations for layer in image.layers] == [None, notes]
        assert {layer.descriptor.media_type for layer in image.layers} == {model.OCI_LAYER_GZIP}
        assert contents(source, image) == [b"one", b"two"]
        assert model.digest_of(source.read_blob(image.descriptor.digest)) == image.descriptor.digest
        assert model.digest_of(source.read_blob(image.manifest.config.digest)) == image.manifest.config.digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["image.tar"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_docker_archive_with_links_between_layers(tmp_path: Path, form: int) -> None:
    deep = "d" * 60 + "/" + "e" * 60
    files = made.docker(
        {
            f"{deep}/layer.tar": b"one",
            "b/layer.tar": gzip.compress(b"two", mtime=0),
            "./c/layer.tar": b"one",
            "hard": b"one",
        },
        tags=["a:1", "team/b:2", "<none>:<none>"],
    )
    del files["./c/layer.tar"], files["hard"]
    links = [made.link("c/layer.tar", "../x"), made.link("hard", "b/../plain", tarfile.LNKTYPE)]
    # The oldest format has no room for a target that long.
    links.append(made.link("x", "./hard" if form == tarfile.USTAR_FORMAT else f"{deep}/layer.tar"))
    path = write(tmp_path, made.tar({**files, "plain": b"one"}, links=links, form=form))
    with archive.open_archive(path) as source:
        image = source.image(AMD64)
        assert image.names == ("docker.io/library/a:1", "docker.io/team/b:2")
        assert contents(source, image) == [b"one", b"two", b"one", b"one"]
        assert [layer.descriptor.media_type for layer in image.layers] == [
            model.OCI_LAYER,
            model.OCI_LAYER_GZIP,
            model.OCI_LAYER,
            model.OCI_LAYER,
        ]
        text = source.read_blob(image.descriptor.digest)
        assert json.loads(text)["config"]["digest"] == made.digest(files["config.json"])
        assert model.decode(text, model.Manifest, "it") == image.manifest
        assert source.read_blob(image.manifest.config.digest) == files["config.json"]


def test_names_from_manifest_json_are_joined(tmp_path: Path) -> None:
    files = made.oci(name="docker.io/library/a:1")
    config = next(name for name, data in files.items() if b"rootfs" in data)
    files["manifest.json"] = json.dumps([{"Config": config, "RepoTags": ["a:1", "b:2"], "Layers": []}]).encode()
    with archive.open_archive(write(tmp_path, made.tar(files))) as source:
        assert source.image(AMD64).names == ("docker.io/library/a:1", "docker.io/library/b:2")


def test_the_form_for_the_machine_is_taken_from_a_nested_index(tmp_path: Path) -> None:
    amd, amd_blobs = made.image([b"amd"])
    arm, arm_blobs = made.image([b"arm"], architecture="arm64")
    inner = made.index_json(
        made.entry(amd, platform={"os": "linux", "architecture": "amd64"}),
        made.entry(arm, platform={"os": "linux", "architecture": "arm64", "variant": "v8"}),
        # What build tools attach: statements about the image, for no platform.
        made.entry(b"statement", platform={"os": "unknown", "architecture": "unknown"}),
    )
    outer = made.index_json({**made.entry(inner, "docker.io/library/a:1"), "mediaType": model.OCI_INDEX})
    # The amd64 blobs are missing, as exporters of one platform leave them.
    files = {"index.json": outer, made.blob(inner): inner, **arm_blobs}
    with archive.open_archive(write(tmp_path, made.tar(files))) as source:
        image = source.image(ARM64)
        assert image.names == ("docker.io/library/a:1",)
        assert contents(source, image) == [b"arm"]
        with pytest.raises(errors.InvalidArgumentError, match="has no file"):
            source.image(AMD64)
        with pytest.raises(errors.UnsupportedError) as caught:
            source.image(model.Platform("riscv64", "linux"))
        assert str(caught.value).endswith(
            ": the image is for linux/amd64, linux/arm64/v8, this machine is linux/riscv64"
        )
    files.update(amd_blobs)
    with archive.open_archive(write(tmp_path, made.tar(files))) as source:
        assert contents(source, source.image(AMD64)) == [b"amd"]


@pytest.mark.parametrize("files", [made.oci(architecture="arm64"), made.docker({"l": b"x"}, architecture="arm64")])
def test_an_image_for_another_machine(tmp_path: Path, files: dict[str, bytes]) -> None:
    path = write(tmp_path, made.tar(files))
    with archive.open_archive(path) as source, pytest.raises(errors.UnsupportedError) as caught:
        source.image(AMD64)
    assert str(caught.value) == f"{path}: the image is for linux/arm64, this machine is linux/amd64"


def test_several_images(tmp_path: Path) -> None:
    one, one_blobs = made.image([b"one"])
    two, two_blobs = made.image([b"two"])
    index = made.index_json(
        made.entry(one, "docker.io/library/a:1"),
        made.entry(two, "docker.io/library/b:1"),
        made.entry(one, "docker.io/library/a:2"),
    )
    path = write(tmp_path, made.tar({"index.json": index, **one_blobs, **two_blobs}))
    with archive.open_archive(path) as source:
        first, second = source.images(AMD64)
        assert first.names == ("docker.io/library/a:1", "docker.io/library/a:2")
        assert contents(source, second) == [b"two"]
        with pytest.raises(errors.InvalidArgumentError, match="holds 2 images"):
            source.image(AMD64)


def test_images_without_full_names_are_images_like_others(tmp_path: Path) -> None:
    one, two, old = made.image([b"1"]), made.image([b"2"]), made.image([b"0"], architecture="386")
    blobs = {**one[1], **two[1], **old[1]}
    tag = {"org.opencontainers.image.ref.name": "latest"}
    for index, expected in (
        # Whatever machine each is for: what has no whole name in common is not one image.
        (made.index_json(made.entry(one[0]), made.entry(old[0]), made.entry(two[0])), "102"),
        (made.index_json(made.entry(one[0], annotations=tag), made.entry(old[0], annotations=tag)), "10"),
        (made.index_json(made.entry(one[0], "a:1"), made.entry(two[0], "a:1")), "12"),
        (made.index_json(made.entry(old[0], "a:1"), made.entry(two[0], "docker.io/library/a:1")), "2"),
    ):
        with archive.open_archive(write(tmp_path, made.tar({"index.json": index, **blobs}))) as source:
            found = [contents(source, image) for image in source.images(AMD64)]
            assert found == [[digit.encode()] for digit in expected]


def artifact(kind: str) -> tuple[bytes, made.Files]:
    manifest, blobs = made.image([b"one"])
    value = json.loads(manifest)
    if kind == "signature":
        value["layers"][0]["mediaType"] = "application/vnd.dev.cosign.simplesigning.v1+json"
    else:
        value["config"] = made.descriptor("application/vnd.oci.empty.v1+json", b"{}")
        value["artifactType"] = "application/vnd.example"
    text = json.dumps(value).encode()
    return text, {**blobs, made.blob(b"{}"): b"{}", made.blob(text): text}


@pytest.mark.parametrize("kind", ["signature", "artifact"])
def test_artifacts_beside_an_image_are_passed_over(tmp_path: Path, kind: str) -> None:
    manifest, blobs = made.image([b"one"])
    other, other_blobs = artifact(kind)
    inner = made.index_json(made.entry(other), made.entry(manifest, platform={"os": "linux", "architecture": "amd64"}))
    outer = made.index_json(
        made.entry(other, "localhost/a:sha256-1.sig"), {**made.entry(inner, "a:1"), "mediaType": model.OCI_INDEX}
    )
    files = {"index.json": outer, made.blob(inner): inner, **blobs, **other_blobs}
    with archive.open_archive(write(tmp_path, made.tar(files))) as source:
        assert source.image(AMD64).names == ("docker.io/library/a:1",)
    files["index.json"] = made.index_json(made.entry(other))
    with (
        archive.open_archive(write(tmp_path, made.tar(files))) as source,
        pytest.raises(errors.InvalidArgumentError, match="it holds no image"),
    ):
        source.image(AMD64)


@pytest.mark.parametrize(
    "kind",
    [
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
        # docker says so of layers that are packed all the same.
        "application/vnd.docker.image.rootfs.diff.tar",
    ],
)
def test_every_name_of_a_zstd_layer(tmp_path: Path, kind: str) -> None:
    packed = made.COMPRESSIONS["zst"](b"a layer")
    manifest, blobs = made.image([b"a layer"])
    value = json.loads(manifest)
    value["layers"] = [made.descriptor(kind, packed)]
    text = json.dumps(value).encode()
    files = {"index.json": made.index_json(made.entry(text)), **blobs, made.blob(text): text, made.blob(packed): packed}
    with archive.open_archive(write(tmp_path, made.tar(files))) as source:
        image = source.image(AMD64)
        # What every containerd can unpack, whatever the manifest calls it; the manifest stays as it is.
        assert image.layers[0].descriptor.media_type == model.OCI_LAYER_ZSTD
        assert source.read_blob(image.descriptor.digest) == text


def test_an_image_without_layers(tmp_path: Path) -> None:
    config = b'{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":null}}'
    manifest = json.dumps(
        {"schemaVersion": 2, "config": made.descriptor(model.OCI_CONFIG, config), "layers": None, "annotations": None}
    ).encode()
    index = made.index_json(made.entry(manifest, "a:1", platform=None))
    files = {"index.json": index, made.blob(config): config, made.blob(manifest): manifest}
    with archive.open_archive(write(tmp_path, made.tar(files))) as source:
        assert source.image(AMD64).layers == ()


def test_manifest_json_may_name_one_image_twice(tmp_path: Path) -> None:
    files = made.oci(name=None)
    config = next(name for name, data in files.items() if b"rootfs" in data)
    files["manifest.json"] = json.dumps([{"Config": config, "RepoTags": [tag]} for tag in ("a:1", "b:2")]).encode()
    with archive.open_archive(write(tmp_path, made.tar(files))) as source:
        assert source.image(AMD64).names == ("docker.io/library/a:1", "docker.io/library/b:2")


def test_docker_schema_2_in_an_oci_layout(tmp_path: Path) -> None:
    manifest, blobs = made.image([b"one"])
    docker = (
        manifest.replace(model.OCI_MANIFEST.encode(), model.DOCKER_MANIFEST.encode())
        .replace(model.OCI_CONFIG.encode(), model.DOCKER_CONFIG.encode())
        .replace(model.OCI_LAYER_GZIP.encode(), b"application/vnd.docker.image.rootfs.diff.tar.gzip")
    )
    entry = {**made.entry(docker, "a:1"), "mediaType": model.DOCKER_MANIFEST}
    files = {**blobs, made.blob(docker): docker, "index.json": made.index_json(entry)}
    with archive.open_archive(write(tmp_path, made.tar(files))) as source:
        image = source.image(AMD64)
        assert image.manifest.layers[0].media_type == "application/vnd.docker.image.rootfs.diff.tar.gzip"
        assert image.layers[0].descriptor.media_type == model.OCI_LAYER_GZIP
        assert contents(source, image) == [b"one"]


def test_a_layer_is_read_in_pieces(tmp_path: Path) -> None:
    layer = bytes(range(256)) * 20_000  # 5 MB: more than one buffer
    with archive.open_archive(write(tmp_path, made.tar(made.docker({"l": layer})))) as source:
        image = source.image(AMD64)
        with source.open_blob(image.layers[0].descriptor.digest) as blob:
            pieces = list(iter(lambda: blob.read(100_000), b""))
        assert b"".join(pieces) == layer
        assert len(pieces) == -(-len(layer) // 100_000)


def test_a_missing_file() -> None:
    with (
        pytest.raises(errors.NotFoundError, match="there is no image archive /nowhere/x"),
        archive.open_archive("/nowhere/x"),
    ):
        pass


def test_a_blob_that_isnt_there(tmp_path: Path) -> None:
    with (
        archive.open_archive(write(tmp_path, made.tar(made.oci()))) as source,
        pytest.raises(errors.InvalidArgumentError, match="has no file"),
    ):
        source.open_blob("sha256:" + "0" * 64)


@pytest.mark.parametrize("form", [None, "zst"])
def test_an_archive_through_a_pipe(tmp_path: Path, form: str | None) -> None:
    data = made.tar(made.oci([b"a layer" * 100_000]))
    data = made.COMPRESSIONS[form](data) if form else data
    os.mkfifo(tmp_path / "fifo")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with subprocess.Popen(["tee", str(tmp_path / "fifo")], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as writer:
        thread = threading.Thread(target=writer.communicate, args=[data])
        thread.start()
        with archive.open_archive(f"{tmp_path}/fifo", piped=True, scratch_dir=str(scratch)) as source:
            assert contents(source, source.image(AMD64)) == [b"a layer" * 100_000]
            assert list(scratch.iterdir()) == []
        thread.join()


def test_a_pipe_that_ends_too_early_is_told(tmp_path: Path) -> None:
    for data, why in ((b"", "it is empty"), (made.tar(made.oci())[:2000], "the image archive it ends too early")):
        ours, theirs = os.pipe()
        os.write(theirs, data)
        os.close(theirs)
        with (
            pytest.raises(errors.InvalidArgumentError, match=why),
            archive.open_archive(ours, label="it", piped=True),
        ):
            pass
        os.close(ours)


def test_no_room_for_a_pipe_names_the_place(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.close(theirs)
    with (
        pytest.raises(errors.FailedPreconditionError, match=f"it can't be copied to {tmp_path}/gone: No such file"),
        archive.open_archive(ours, label="it", piped=True, scratch_dir=f"{tmp_path}/gone"),
    ):
        pass
    os.close(ours)


@pytest.mark.parametrize("piped", [False, True])
def test_no_directory_for_temporary_files_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, piped: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [f"{tmp_path}/gone"])
    data = made.tar(made.oci())
    with open(write(tmp_path, data if piped else made.COMPRESSIONS["gz"](data)), "rb") as file:
        file.seek(1 if piped else 0)
        with (
            pytest.raises(errors.FailedPreconditionError, match="there is no directory for such") as caught,
            archive.open_archive(file.fileno(), label="it", piped=piped),
        ):
            pass
    assert caught.value.hint.endswith("TMPDIR")


def test_what_images_are_recorded_as(tmp_path: Path) -> None:
    one, blobs = made.image([b"one"])
    two, more = made.image([b"two"])
    both = {**blobs, **more}
    with archive.open_archive(write(tmp_path, made.tar({"index.json": made.index_json(made.entry(one)), **both}))) as a:
        found = a.images(AMD64)
        assert archive.recorded_names(found, ["/a.tar"]) == [("nix:0/a.tar:latest",)]
        # Neither a pipe nor such paths are references.
        for paths in ([], ["/tmp/a:b.tar"], ["/nix/store/0c0qxbrxlfz2nzi6jxz6a3ssa0cl6lrw-dir/image.tar"]):
            assert archive.recorded_names(found, paths) == [(f"localhost/import@{made.digest(one)}",)]
    # A digest that isn't the manifest's own names something else.
    foreign = made.entry(one, f"a@{made.digest(two)}")
    index = made.index_json(foreign, made.entry(two, "b:1"), made.entry(two, f"b@{made.digest(two)}"))
    with archive.open_archive(write(tmp_path, made.tar({"index.json": index, **both}))) as a:
        expected = [
            (f"localhost/import@{made.digest(one)}",),
            ("docker.io/library/b:1", f"docker.io/library/b@{made.digest(two)}"),
        ]
        assert archive.recorded_names(a.images(AMD64), ["/a.tar"]) == expected


@pytest.mark.parametrize("in_layout", [True, False])
def test_only_the_archive_at_a_path_is_called_by_it(tmp_path: Path, *, in_layout: bool) -> None:
    """Whoever pulls that path later must not get what another archive put there."""
    name = "nix:0/nix/store/0c0qxbrxlfz2nzi6jxz6a3ssa0cl6lrw-nix-image-a.tar:latest"
    files = made.oci(name=name) if in_layout else made.docker({"l": b"x"}, tags=[name])
    with archive.open_archive(write(tmp_path, made.tar(files))) as a:
        found = a.images(AMD64)
        assert found[0].names == (name,)
        path = name.removeprefix("nix:0").removesuffix(":latest")
        # By a link that leads there, too.
        for paths in ([path], ["/home/ada/result", path]):
            assert archive.recorded_names(found, paths) == [(name,)]
        assert archive.recorded_names(found, ["/tmp/copy.tar"]) == [("nix:0/tmp/copy.tar:latest",)]
        assert archive.recorded_names(found, []) == [(f"localhost/import@{found[0].descriptor.digest}",)]
