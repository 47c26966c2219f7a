"""OCI structures: what is tolerated, what is refused, how they are written."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet import errors
from nixlet.images import model, platforms

DIGEST = "sha256:" + "a" * 64


def test_unknown_fields_and_nulls_are_tolerated() -> None:
    text: dict[str, object] = {
        "created": None,
        "architecture": "amd64",
        "os": "linux",
        "container": "old",
        "config": {
            "Env": None,
            "Cmd": ["sh"],
            "Volumes": {"/data": {}, "/more": None},
            "Hostname": "x",
            "Labels": None,
        },
        "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
        "history": [{"created_by": "x"}],
    }
    config = model.decode(json.dumps(text).encode(), model.ImageConfig, "it")
    assert config.config == model.ContainerConfig(cmd=["sh"], volumes={"/data": {}, "/more": None})
    assert config.platform == model.Platform("amd64", "linux")


@pytest.mark.parametrize(
    "digest",
    ["", "sha256:", "sha256:" + "A" * 64, "sha256:" + "a" * 63, DIGEST + "\n", "x" + DIGEST, "sha512:" + "a" * 128],
)
def test_a_digest_has_one_form(digest: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="the thing is malformed"):
        model.decode(json.dumps({"digest": digest, "size": 1}).encode(), model.Descriptor, "the thing")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff",
        b'{"architecture": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"null",
        b'{"digest":1,"size":-1}',
    ],
)
def test_no_json_gets_through(text: bytes) -> None:
    for kind in (model.Descriptor, model.Manifest):
        with pytest.raises(errors.InvalidArgumentError):
            model.decode(text, kind, "it")


def test_large_json_is_refused_before_it_is_read() -> None:
    with pytest.raises(errors.InvalidArgumentError, match="larger than 4194304 bytes"):
        model.decode(b'"' + b"a" * model.MAX_JSON_BYTES + b'"', model.Index, "the index")


def test_the_first_schema_is_refused() -> None:
    with pytest.raises(errors.InvalidArgumentError):
        model.decode(b'{"schemaVersion":1,"manifests":[]}', model.Index, "it")


def test_writing_keeps_the_specifications_order_and_leaves_nothing_empty() -> None:
    config = model.ImageConfig(
        architecture="arm64",
        os="linux",
        config=model.ContainerConfig(labels={"z": "é<&>"}, env=["A=1"], exposed_ports={"80/tcp": {}}, cmd=[]),
        rootfs=model.RootFS("layers", [DIGEST]),
    )
    text = model.encode(config).decode()
    assert text == (
        '{\n  "architecture": "arm64",\n  "os": "linux",\n  "config": {\n    "ExposedPorts": {\n      "80/tcp": {}\n    },\n'
        '    "Env": [\n      "A=1"\n    ],\n    "Cmd": [],\n    "Labels": {\n      "z": "é<&>"\n    }\n  },\n'
        '  "rootfs": {\n    "type": "layers",\n    "diff_ids": [\n      "' + DIGEST + '"\n    ]\n  }\n}'
    )
    assert model.decode(text.encode(), model.ImageConfig, "it") == config


@given(st.lists(st.binary(max_size=8)))
def test_chain_ids_follow_the_specification(contents: list[bytes]) -> None:
    diff_ids = [model.digest_of(content) for content in contents]
    chain = model.chain_ids(diff_ids)
    assert chain[:1] == tuple(diff_ids[:1])
    for below, diff_id, own in zip(chain, diff_ids[1:], chain[1:], strict=False):
        assert own == "sha256:" + hashlib.sha256(f"{below} {diff_id}".encode()).hexdigest()
    assert len(chain) == len(diff_ids)


def test_chain_id_of_two_known_layers() -> None:
    # What sha256sum says of "sha256:aa… sha256:bb…".
    pair = ["sha256:" + "a" * 64, "sha256:" + "b" * 64]
    assert model.chain_ids(pair)[1] == "sha256:ccd722928bd92476ba1745586fed6e45a102504185ad88cd89e01ff116fd146c"


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("x86_64", "linux/amd64"),
        ("aarch64", "linux/arm64/v8"),
        ("armv7l", "linux/arm/v7"),
        ("i686", "linux/386"),
        ("riscv64", "linux/riscv64"),
        ("ppc64le", "linux/ppc64le"),
        ("s390x", "linux/s390x"),
        ("loongarch64", "linux/loong64"),
    ],
)
def test_machines_have_gos_names(machine: str, expected: str) -> None:
    assert str(platforms.host_platform(machine)) == expected


@pytest.mark.parametrize(
    ("image", "machine", "expected"),
    [
        (("amd64", ""), "x86_64", 0),
        (("amd64", "v1"), "x86_64", 0),
        (("amd64", "v3"), "x86_64", None),
        (("x86_64", ""), "x86_64", 0),
        (("386", ""), "x86_64", 1),
        (("i386", ""), "i686", 0),
        (("amd64", ""), "i686", None),
        (("arm64", ""), "aarch64", 0),
        (("arm64", "v8"), "aarch64", 0),
        (("arm64", ""), "x86_64", None),
        (("arm64", "v9"), "aarch64", None),
        (("arm", "v7"), "aarch64", 2),
        (("armhf", ""), "aarch64", 2),
        (("", ""), "x86_64", None),
        (("arm", ""), "armv7l", 0),
        (("arm", "v6"), "armv7l", 1),
        (("arm", "v7"), "armv6l", None),
        (("arm", "odd"), "armv7l", None),
    ],
)
def test_what_runs_on_what(image: tuple[str, str], machine: str, expected: int | None) -> None:
    offered = model.Platform(image[0], "linux", image[1])
    assert platforms.rank(offered, platforms.host_platform(machine)) == expected
    assert platforms.rank(model.Platform(image[0], "windows", image[1]), platforms.host_platform(machine)) is None


@pytest.mark.parametrize(
    ("image", "machine", "expected"),
    [
        (("amd64", ""), "x86_64", 0),
        (("386", ""), "x86_64", 1),
        (("amd64", "v3"), "x86_64", 2),
        (("", ""), "x86_64", 2),
        (("arm64", "v9"), "aarch64", 5),
        (("arm64", ""), "x86_64", None),
        (("arm", "v7"), "armv6l", None),
    ],
)
def test_an_images_only_form_is_taken_where_no_choice_is_wrong(
    image: tuple[str, str], machine: str, expected: int | None
) -> None:
    offered = model.Platform(image[0], "", image[1])
    assert platforms.rank_alone(offered, platforms.host_platform(machine)) == expected


def test_nulls_are_what_go_takes_them_for() -> None:
    text = b'{"architecture":null,"os":null,"config":{"Env":null,"Volumes":{"/v":null}},"rootfs":{"type":"layers","diff_ids":null}}'
    config = model.decode(text, model.ImageConfig, "it")
    assert config == model.ImageConfig(config=model.ContainerConfig(volumes={"/v": None}))
    assert model.decode(b'{"rootfs":null}', model.ImageConfig, "it").rootfs.diff_ids == []
    assert model.decode(b'{"manifests":null,"mediaType":null}', model.Index, "it").manifests == []
