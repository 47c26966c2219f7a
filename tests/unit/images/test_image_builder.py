"""Building: inheritance, annotations, the archive's form, whole files or none."""

import errno
import gzip
import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.host import files
from nixlet.images import archive, builder, layers, model, reference
from nixlet.store import closures, paths
from support import image_archives as made

AMD64 = model.Platform("amd64", "linux")


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, str]:
    """The files of a build, over a store with a directory and a plain file."""
    store = tmp_path / "store"
    package, file, info = (f"{store}/{number:032}-{name}" for number, name in enumerate(("package", "file", "info")))
    os.makedirs(f"{package}/bin")
    Path(f"{package}/bin/hello").write_text("x")
    Path(file).write_text("x")
    os.mkdir(info)
    Path(info, "store-paths").write_text(f"{package}\n{file}\n")
    (tmp_path / "config.json").write_text('{"entrypoint":["/bin/hello"],"ENV":["A=1"],"port":80,"Volumes":{"/v":null}}')
    (tmp_path / "roots.json").write_text(json.dumps([package]))
    return {
        "config": f"{tmp_path}/config.json",
        "closure": f"{info}/store-paths",
        "copy_to_root": f"{tmp_path}/roots.json",
        "architecture": "amd64",
        "store_dir": str(store),
    }


Build = Callable[..., archive.ArchiveImage]


@pytest.fixture
def build(inputs: dict[str, str], tmp_path: Path) -> Build:
    def make(output: str = "out.tar", **more: Any) -> archive.ArchiveImage:
        builder.build_image(builder.read_request(**{**inputs, **more}), f"{tmp_path}/{output}")
        with archive.open_archive(f"{tmp_path}/{output}") as source:
            return source.image(AMD64)

    return make


def test_the_files_are_read(inputs: dict[str, str]) -> None:
    request = builder.read_request(**inputs, ref="hello:1")
    store = inputs["store_dir"]
    assert request.config == model.ContainerConfig(entrypoint=["/bin/hello"], env=["A=1"], volumes={"/v": None})
    assert request.closure_info == f"{store}/{2:032}-info"
    assert request.closure == (f"{store}/{0:032}-package", f"{store}/{1:032}-file")
    assert request.copy_to_root == (f"{store}/{0:032}-package",)
    assert request.name == reference.ImageReference("docker.io", "library/hello", "1", None)
    assert request.platform == AMD64


def test_a_list_that_is_no_closure_infos_makes_the_older_form(
    inputs: dict[str, str], build: Build, tmp_path: Path
) -> None:
    (tmp_path / "list").write_bytes(Path(inputs["closure"]).read_bytes())
    notes = build(closure=f"{tmp_path}/list").layers[-1].descriptor.annotations
    assert notes is not None
    named = closures.parse_annotations(notes, inputs["store_dir"])
    assert named == closures.ClosureReference(None, builder.read_request(**inputs).closure)
    assert notes[closures.LAYER] == "true"


def test_the_archive(build: Build, inputs: dict[str, str], tmp_path: Path) -> None:
    image = build()
    assert image.names == (f"nix:0{tmp_path}/out.tar:latest",)
    assert image.layers[0].descriptor.annotations == {closures.CLOSURE: os.path.dirname(inputs["closure"])}
    with tarfile.open(f"{tmp_path}/out.tar") as tar:
        members = tar.getmembers()
        texts = {
            name: json.load(tar.extractfile(name) or pytest.fail(name))
            for name in ("index.json", "manifest.json", "oci-layout")
        }
    assert [m.name for m in members[:2]] == ["blobs", "blobs/sha256"]
    assert [m.name for m in members[-3:]] == ["index.json", "manifest.json", "oci-layout"]
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert {(m.uid, m.gid, m.uname, m.mtime) for m in members} == {(0, 0, "", 0)}
    assert texts["index.json"]["manifests"][0]["annotations"] == {
        "io.containerd.image.name": f"nix:0{tmp_path}/out.tar:latest",
        "org.opencontainers.image.ref.name": "latest",
    }
    assert texts["manifest.json"] == [
        {
            "Config": f"blobs/{image.manifest.config.digest.replace(':', '/')}",
            "RepoTags": [f"nix:0{tmp_path}/out.tar:latest"],
            "Layers": [f"blobs/{image.layers[0].descriptor.digest.replace(':', '/')}"],
        }
    ]
    assert texts["oci-layout"] == {"imageLayoutVersion": "1.0.0"}
    assert os.stat(f"{tmp_path}/out.tar").st_mode & 0o777 == 0o644


def test_the_same_inputs_give_the_same_bytes(build: Build, inputs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "base.tar").write_bytes(made.tar(made.docker({"l": b"base"})))
    for ref in ("hello:1", "hello@sha256:" + "0" * 64):
        build("one.tar", ref=ref, from_image=f"{tmp_path}/base.tar")
        os.utime(inputs["closure"], (1, 1))
        build("two.tar", ref=ref, from_image=f"{tmp_path}/base.tar")
        assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_golden_archive(tmp_path: Path) -> None:
    """The bytes of an image with an empty closure; they change only with the format, or with zlib's own output."""
    request = builder.BuildRequest(
        config=model.ContainerConfig(cmd=["/bin/hello"]),
        closure=(),
        closure_info=paths.parse("/nix/store/0c0qxbrxlfz2nzi6jxz6a3ssa0cl6lrw-closure-info"),
        name=reference.parse("hello:1"),
        platform=AMD64,
    )
    built = builder.build_image(request, f"{tmp_path}/out.tar")
    assert built.name == "docker.io/library/hello:1"
    assert built.config_digest == "sha256:4ee9942ff66a47a8fdc25efeedf90d7f9d280a6853b8a3ba6fa519863b5dd78e"
    empty = layers.render({}).content
    if hashlib.sha256(empty).hexdigest() == "b94b4d079a0a84bdf416bc4a472ccff4775bb999858da78e854446f0d5221b84":
        assert (
            hashlib.sha256((tmp_path / "out.tar").read_bytes()).hexdigest()
            == "a5676c9fcdc450500d96a964def31bc82ff3cf80fec8041b9aef3ca93120afab"
        )
    assert gzip.decompress(empty) == b"\x00" * 10240


def test_a_base_image_is_inherited(build: Build, inputs: dict[str, str], tmp_path: Path) -> None:
    notes = {closures.CLOSURE: "/nix/store/0c0qxbrxlfz2nzi6jxz6a3ssa0cl6lrw-closure-info"}
    config = {
        "User": "1000",
        "Env": ["PATH=/bin", "A=0", "B=2"],
        "Cmd": ["sh"],
        "Entrypoint": ["old"],
        "Volumes": {"/base": {}},
        "Labels": {"a": "b"},
        "WorkingDir": "/w",
        "Healthcheck": {"Test": ["NONE"]},
        "OnBuild": ["RUN x"],
    }
    base = made.oci([b"low", b"high"], annotations=[None, notes], config=config)
    (tmp_path / "base.tar").write_bytes(made.tar(base))
    image = build(from_image=f"{tmp_path}/base.tar")
    assert image.config.config == model.ContainerConfig(
        user="1000",
        env=["PATH=/bin", "A=1", "B=2"],
        entrypoint=["/bin/hello"],
        volumes={"/base": {}, "/v": None},
        labels={"a": "b"},
        working_dir="/w",
        healthcheck={"Test": ["NONE"]},
    )
    assert [layer.descriptor.annotations for layer in image.layers[:2]] == [None, notes]
    assert {layer.descriptor.media_type for layer in image.layers} == {model.OCI_LAYER_GZIP}
    assert [layer.diff_id for layer in image.layers[:2]] == [made.digest(b"low"), made.digest(b"high")]
    with archive.open_archive(f"{tmp_path}/out.tar") as source:
        for layer in image.layers:
            with source.open_blob(layer.descriptor.digest) as blob:
                assert made.digest(gzip.decompress(blob.read())) == layer.diff_id


def test_a_nix_image_can_be_the_base_of_another(build: Build, tmp_path: Path) -> None:
    first = build("base.tar")
    second = build(from_image=f"{tmp_path}/base.tar")
    assert second.layers[0] == first.layers[0] == second.layers[1]


def test_a_docker_archive_as_base(build: Build, tmp_path: Path) -> None:
    layers_of_base = {"a/layer.tar": b"plain", "b/layer.tar": gzip.compress(b"packed", mtime=0)}
    (tmp_path / "base.tar").write_bytes(made.tar(made.docker(layers_of_base)))
    image = build(from_image=f"{tmp_path}/base.tar")
    assert [layer.descriptor.media_type for layer in image.layers] == [
        model.OCI_LAYER,
        model.OCI_LAYER_GZIP,
        model.OCI_LAYER_GZIP,
    ]


def test_what_is_set_overrides_even_when_empty() -> None:
    base = model.ContainerConfig(cmd=["sh"], working_dir="/w", env=["A=1"])
    merged = builder.merge_configs(base, model.ContainerConfig(cmd=[], working_dir="", env=["A"]))
    assert merged == model.ContainerConfig(cmd=[], working_dir="", env=["A"])
    assert builder.merge_configs(base, model.ContainerConfig()) == base


def test_a_new_entrypoint_gets_no_arguments_that_were_meant_for_another() -> None:
    base = model.ContainerConfig(entrypoint=["old"], cmd=["sh"], args_escaped=True)
    merge = builder.merge_configs
    assert merge(base, model.ContainerConfig(entrypoint=["new"])) == model.ContainerConfig(entrypoint=["new"])
    assert merge(base, model.ContainerConfig(entrypoint=[])) == model.ContainerConfig(entrypoint=[])
    assert merge(base, model.ContainerConfig(entrypoint=["new"], cmd=["x"])).cmd == ["x"]
    assert merge(base, model.ContainerConfig(cmd=["x"])).entrypoint == ["old"]


@pytest.mark.parametrize(("base", "expected"), [(("arm", "v7"), ""), (("arm64", "v9"), "v9")])
def test_a_base_for_another_processor_says_nothing_of_ours(
    inputs: dict[str, str], tmp_path: Path, base: tuple[str, str], expected: str
) -> None:
    (tmp_path / "base.tar").write_bytes(made.tar(made.oci(architecture=base[0], variant=base[1])))
    request = builder.read_request(**{**inputs, "architecture": "arm64", "from_image": f"{tmp_path}/base.tar"})
    builder.build_image(request, f"{tmp_path}/out.tar")
    with archive.open_archive(f"{tmp_path}/out.tar") as source:
        config = source.image(model.Platform("arm64", "linux")).config
    assert config.platform == model.Platform("arm64", "linux", expected)


def test_what_is_neither_json_nor_a_file_gets_a_hint(inputs: dict[str, str]) -> None:
    with pytest.raises(errors.NotFoundError, match="there is no file Entrypoint=x") as caught:
        builder.read_request(**{**inputs, "config": "Entrypoint=x"})
    assert "JSON" in caught.value.hint


def test_json_can_be_given_in_place_of_a_file(inputs: dict[str, str]) -> None:
    as_files = builder.read_request(**inputs)
    given = {name: " " + Path(inputs[name]).read_text() for name in ("config", "copy_to_root")}
    assert builder.read_request(**{**inputs, **given}) == as_files
    for name, text in (("config", "{"), ("config", "[]"), ("copy_to_root", "{}"), ("copy_to_root", "[1]")):
        with pytest.raises(
            errors.InvalidArgumentError, match=f"what is given as {name.replace('_', '-')} is malformed"
        ):
            builder.read_request(**{**inputs, name: text})


@pytest.mark.parametrize(
    ("base", "why"),
    [
        (made.tar(made.oci(architecture="arm64")), "the image is for linux/arm64, this machine is linux/amd64"),
        (made.tar({**made.docker({"l": b"one"}), "l": b"two"}), "has another digest"),
        (b"nothing", "is not an image archive"),
    ],
)
def test_a_failed_build_leaves_nothing(build: Build, tmp_path: Path, base: bytes, why: str) -> None:
    (tmp_path / "base.tar").write_bytes(base)
    (tmp_path / "out.tar").write_bytes(b"before")
    listed = sorted(os.listdir(tmp_path))
    with pytest.raises((errors.InvalidArgumentError, errors.UnsupportedError), match=why):
        build(from_image=f"{tmp_path}/base.tar")
    assert (tmp_path / "out.tar").read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == listed


def test_an_output_that_cant_be_written(build: Build) -> None:
    with pytest.raises(errors.FailedPreconditionError, match="can't write the image archive"):
        build("missing/out.tar", ref="a:1")


@pytest.mark.parametrize("kind", ["fifo", "directory", "link to a device", "link to itself"])
def test_what_is_no_file_is_not_replaced(build: Build, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out.tar"
    if kind == "fifo":
        os.mkfifo(output)
    elif kind == "directory":
        output.mkdir()
    else:
        output.symlink_to("/dev/null" if kind == "link to a device" else output)
    before, device = output.lstat(), os.stat("/dev/null")
    with pytest.raises(errors.FailedPreconditionError, match=f"{output}: what is there is no file"):
        build(ref="a:1")
    assert (output.lstat().st_ino, output.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert os.stat("/dev/null").st_rdev == device.st_rdev


def test_a_link_stays_and_leads_to_the_archive(build: Build, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.tar").symlink_to("elsewhere/archive")
    # At first it leads to nothing, then to a file.
    for _ in range(2):
        assert build().names == (f"nix:0{tmp_path}/out.tar:latest",)
        assert os.readlink(tmp_path / "out.tar") == "elsewhere/archive"
        assert (tmp_path / "elsewhere/archive").is_file()
    assert os.listdir(tmp_path / "elsewhere") == ["archive"]


def test_a_base_that_cant_be_read_is_the_bases_trouble(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base.tar").write_bytes(made.tar(made.oci([os.urandom(4 << 20)])))
    read = os.pread

    def damaged(fd: int, length: int, offset: int) -> bytes:
        if offset > 2 << 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, min(length, 1 << 16), offset)

    monkeypatch.setattr(os, "pread", damaged)
    with pytest.raises(errors.UnavailableError, match=f"the image archive {tmp_path}/base.tar can't be read: Input"):
        build(from_image=f"{tmp_path}/base.tar", ref="a:1")


@pytest.mark.parametrize(
    ("field", "content"),
    [
        ("config", '{"Entrypoint":"/bin/sh"}'),
        ("config", "[]"),
        ("config", '{"Env":[1]}'),
        ("closure", "/etc/passwd\n"),
        ("copy_to_root", '["/etc"]'),
        ("copy_to_root", '"/etc"'),
    ],
)
def test_malformed_inputs(inputs: dict[str, str], tmp_path: Path, field: str, content: str) -> None:
    (tmp_path / "bad").write_text(content)
    with pytest.raises(errors.InvalidArgumentError):
        builder.read_request(**{**inputs, field: f"{tmp_path}/bad"})
    with pytest.raises(errors.NotFoundError, match="there is no file /nowhere"):
        builder.read_request(**{**inputs, field: "/nowhere"})


def test_an_archive_is_durable_before_its_name_is_told(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []

    def sync(path: str) -> None:
        synced.append((path, os.path.exists(f"{path}/out.tar")))

    monkeypatch.setattr(files, "sync_directory", sync)
    build()
    assert synced == [(str(tmp_path), True)]
