"""Nix images against the real programs: Nix builds them, skopeo reads them, and nix2container makes the same ones."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nixlet.images import archive, builder, layers, model, platforms
from nixlet.store import closures
from support import image_archives as made
from support import parts
from support.nixstore import PrivateStore

NIX = Path(__file__).parents[2] / "nix"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrivateStore]:
    private = PrivateStore(tmp_path / "nix")
    yield private
    private.remove()


@pytest.fixture
def inputs(store: PrivateStore, tmp_path: Path) -> dict[str, str]:
    """The files of a build: a closure with directories, a plain file and links to both, and two trees for the root."""
    package = store.add("package", {"hello": "x", "README": "x"})
    other = store.add("other", {"other": "y"})
    file = store.add("file", "content")
    link = f"{store.store_dir}/{'0' * 32}-link"
    directory_link = f"{store.store_dir}/{'1' * 32}-directory-link"
    os.symlink(file, link)
    os.symlink(package, directory_link)
    info = store.add(
        "closure-info", {"store-paths": "".join(f"{p}\n" for p in (other, link, package, file, directory_link))}
    )
    config = {"entrypoint": ["/hello"], "Env": ["A=b"], "ExposedPorts": {"80/tcp": {}}, "Labels": {"k": "é"}, "port": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "roots.json").write_text(json.dumps([package, other]))
    return {
        "config": f"{tmp_path}/config.json",
        "closure": f"{info}/store-paths",
        "copy_to_root": f"{tmp_path}/roots.json",
    }


def build(store: PrivateStore, inputs: dict[str, str], output: Path, **more: str) -> builder.BuiltImage:
    return builder.build_image(builder.read_request(**inputs, **more, store_dir=store.store_dir), str(output))


def nix2container(inputs: dict[str, str], output: Path, **more: str) -> None:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in {**inputs, **more}.items()]
    subprocess.run([parts.tool("nix2container"), "build", *options, output], check=True, capture_output=True)


def layer_entries(path: Path, number: int = -1) -> list[tuple[Any, ...]]:
    """What a layer's tar file says, member by member."""
    with archive.open_archive(str(path)) as source:
        layer = source.image(platforms.host_platform()).layers[number]
        with source.open_blob(layer.descriptor.digest) as blob:
            plain = gzip.decompress(blob.read())
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        return [(m.name, m.type, m.mode, m.linkname, m.size, m.uid, m.gid, m.uname, m.gname, m.mtime) for m in tar]


def read(path: Path) -> tuple[archive.ArchiveImage, list[bytes]]:
    """An image and its layers' blobs, all digests verified."""
    with archive.open_archive(str(path)) as source:
        image = source.image(platforms.host_platform())
        blobs = []
        for layer in image.layers:
            with source.open_blob(layer.descriptor.digest) as blob:
                blobs.append(blob.read())
        return image, blobs


def test_nix2container_makes_the_same_image(store: PrivateStore, inputs: dict[str, str], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.tar", tmp_path / "theirs.tar"
    build(store, inputs, ours, ref="docker.io/library/hello:1")
    nix2container(inputs, theirs, ref="docker.io/library/hello:1")
    assert layer_entries(ours) == layer_entries(theirs)
    image, other = read(ours)[0], read(theirs)[0]
    assert image.names == other.names == ("docker.io/library/hello:1",)
    assert image.config.config == other.config.config
    assert image.layers[0].descriptor.annotations == other.layers[0].descriptor.annotations
    with tarfile.open(ours) as one, tarfile.open(theirs) as two:
        kept = [[(m.name, m.mode, m.type, m.mtime) for m in tar if "sha256/" not in m.name] for tar in (one, two)]
        assert kept[0] == kept[1]
        index, theirs_index = (json.load(tar.extractfile("index.json") or io.BytesIO()) for tar in (one, two))
    assert index["manifests"][0]["annotations"] == theirs_index["manifests"][0]["annotations"]


def test_the_default_name_is_nix2containers(store: PrivateStore, inputs: dict[str, str], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "one" / "image.tar", tmp_path / "two" / "image.tar"
    for path in (ours, theirs):
        path.parent.mkdir()
    assert build(store, inputs, ours).name == f"nix:0{ours}:latest"
    nix2container(inputs, theirs)
    assert read(theirs)[0].names == (f"nix:0{theirs}:latest",)


def test_images_build_upon_each_others(store: PrivateStore, inputs: dict[str, str], tmp_path: Path) -> None:
    """nix2container loses its base's configuration and annotations; what is built here upon its image keeps them."""
    theirs, ours = tmp_path / "theirs.tar", tmp_path / "ours.tar"
    nix2container(inputs, theirs, ref="docker.io/library/hello:1")
    (tmp_path / "config.json").write_text('{"Env":["B=c"]}')
    build(store, inputs, ours, from_image=str(theirs))
    image = read(ours)[0]
    assert image.config.config is not None
    assert image.config.config.entrypoint == ["/hello"]
    assert image.config.config.env == ["A=b", "B=c"]
    notes = [layer.descriptor.annotations for layer in image.layers]
    assert notes == [{closures.CLOSURE: os.path.dirname(inputs["closure"])}] * 2
    nix2container(inputs, tmp_path / "again.tar", from_image=str(ours))
    with tarfile.open(tmp_path / "again.tar") as tar:
        assert len(json.load(tar.extractfile("manifest.json") or io.BytesIO())[0]["Layers"]) == 3


def skopeo(*argv: str) -> str:
    done = subprocess.run(["skopeo", *argv], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_skopeo_reads_ours_and_we_read_skopeos(
    store: PrivateStore, inputs: dict[str, str], tmp_path: Path, kind: str
) -> None:
    ours, copied = tmp_path / "ours.tar", tmp_path / "copied.tar"
    (tmp_path / "base.tar").write_bytes(made.tar(made.docker({"l": made.tar({"etc/base": b"x"})}, architecture=host())))
    build(store, inputs, ours, ref="hello:1", from_image=f"{tmp_path}/base.tar")
    image, blobs = read(ours)
    shown = json.loads(skopeo("inspect", f"{kind}:{ours}"))
    assert shown["Env"] == ["A=b"]
    assert (shown["Architecture"], shown["Os"]) == (host(), "linux")
    assert len(shown["Layers"]) == 2
    if kind == "oci-archive":
        assert shown["Digest"] == image.descriptor.digest
        assert shown["Layers"] == [layer.descriptor.digest for layer in image.layers]
    skopeo("copy", "--quiet", "--insecure-policy", f"{kind}:{ours}", f"{kind}:{copied}:docker.io/library/hello:2")
    again, blobs_again = read(copied)
    assert [layer.diff_id for layer in again.layers] == [layer.diff_id for layer in image.layers]
    assert [plain(blob) for blob in blobs_again] == [plain(blob) for blob in blobs]
    assert again.config.config == image.config.config
    assert "docker.io/library/hello:2" in again.names


def plain(blob: bytes) -> bytes:
    return gzip.decompress(blob) if blob.startswith(b"\x1f\x8b") else blob


def host() -> str:
    return platforms.host_platform().architecture


#: The command line that the derivations run.
NIXLET = str(Path(sys.executable).with_name("nixlet"))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_nix_builds_the_example(store: PrivateStore, tmp_path: Path) -> None:
    argv: tuple[str, ...] = (
        "nix-build",
        str(NIX / "examples" / "hello.nix"),
        "--no-out-link",
        "--argstr",
        "nixlet",
        NIXLET,
        "-A",
        "image",
    )
    out = store.nix(*argv)
    assert re.fullmatch(rf"{store.store_dir}/[0-9a-z]{{32}}-nix-image-hello\.tar", out)
    # Builds it once more, and compares byte by byte.
    assert store.nix(*argv, "--check") == out
    image = read(Path(out))[0]
    assert image.names == (f"nix:0{out}:latest",)
    assert image.config.config == model.ContainerConfig(entrypoint=["/bin/hello"], env=["PATH=/bin"])
    named = closures.parse_annotations(image.layers[0].descriptor.annotations or {}, store.store_dir)
    assert named is not None
    assert named.closure_info is not None

    # The closure is the closureInfo's, without itself; it has the image's own configuration, but not the image.
    info = str(named.closure_info)
    listed = closures.parse_store_paths(Path(info, "store-paths").read_bytes(), store.store_dir)
    assert {*listed, info} == set(store.nix("nix-store", "-q", "--requisites", info).splitlines())
    names = {path.name.partition("-")[2] for path in listed}
    assert names == {"hello", "hello-link", "libc", "loader", "root", "greeting.txt", "config-hello.json"}
    # Whoever has the image has the closure: the archive refers to it.
    assert {*listed, info, out} == set(store.nix("nix-store", "-q", "--requisites", out).splitlines())

    planned = layers.plan(listed, [])
    assert {entry[0] for entry in layer_entries(Path(out))} >= planned.keys()
    links = [(entry[0], entry[3]) for entry in layer_entries(Path(out)) if entry[1] == tarfile.SYMTYPE]
    assert [name for name, _ in links] == ["bin/hello", "bin/hello-link", "share/greeting.txt"]
    assert all(os.path.isfile(target) for _, target in links)

    # What Nix itself says of the paths is what `registration` says: another database takes it.
    environment = {**store.environment, "NIX_STATE_DIR": str(tmp_path / "other-state")}
    with open(f"{info}/registration", "rb") as registration:
        subprocess.run(["nix-store", "--load-db"], env=environment, stdin=registration, check=True)
    for query in ("--hash", "--size", "--references"):
        argv = ("nix-store", "-q", query, *listed)
        loaded = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout
        assert loaded.strip() == store.nix(*argv)


EXPRESSION = """
let
  # What callPackage does: what the function asks for, from the package set.
  callPackage = function: arguments: function (builtins.intersectAttrs (builtins.functionArgs function) packages // arguments);
  packages = {
    busybox = derivation {
      name = "busybox"; system = builtins.currentSystem; builder = "/bin/busybox";
      args = [ "sh" "-euc" "/bin/busybox mkdir -p $out/bin; /bin/busybox cp /bin/busybox $out/bin" ];
    };
    nixlet = derivation {
      name = "nixlet"; system = builtins.currentSystem; builder = "/bin/busybox";
      args = [ "sh" "-euc" "/bin/busybox mkdir -p $out/bin; /bin/busybox ln -s @nixlet@ $out/bin/nixlet" ];
    };
    stdenv.hostPlatform.system = builtins.currentSystem;
    closureInfo = throw "not asked for";
  };
  buildImage = callPackage (import @nix@/build-image.nix) { };
  base = buildImage { name = "base"; config.Env = [ "A=1" ]; };
  image = buildImage {
    name = "registry.example/team/app";
    tag = "2";
    fromImage = base;
    copyToRoot = [ packages.busybox ];
    config.Cmd = [ "${packages.busybox}/bin/busybox" "it's" ];
  };
in
{
  inherit image;
  load = image.copyToContainerd { address = "/run/it's.sock"; namespace = "k8s.io"; };
}
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_nixpkgs_form(store: PrivateStore, tmp_path: Path) -> None:
    (tmp_path / "image.nix").write_text(EXPRESSION.replace("@nixlet@", NIXLET).replace("@nix@", str(NIX)))
    built = {
        name: Path(store.nix("nix-build", f"{tmp_path}/image.nix", "--no-out-link", "-A", name))
        for name in ("image", "load")
    }
    image = read(built["image"])[0]
    assert built["image"].name.endswith("-nix-image-app.tar")
    assert image.names == ("registry.example/team/app:2",)
    assert image.config.config is not None
    assert image.config.config.env == ["A=1"]
    assert image.config.config.cmd is not None
    assert image.config.config.cmd[1] == "it's"
    named = [closures.parse_annotations(layer.descriptor.annotations or {}, store.store_dir) for layer in image.layers]
    assert len(named) == 2
    assert all(each is not None and each.closure_info is not None for each in named)
    evaluated = store.nix("nix-instantiate", "--eval", f"{tmp_path}/image.nix", "-A", "image.image")
    assert evaluated == '"registry.example/team/app:2"'
    # A script that gives the archive to the command line.
    assert os.access(built["load"], os.X_OK)
    script = built["load"].read_text().replace("exec ", "printf '%s\\n' ")
    printed = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed[1:] == ["image", "load", "--address", "/run/it's.sock", "--namespace", "k8s.io", str(built["image"])]
