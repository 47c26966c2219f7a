"""References: Nix archives, registries, and what is neither."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet import errors
from nixlet.images import reference

STORE_PATH = "/nix/store/0c0qxbrxlfz2nzi6jxz6a3ssa0cl6lrw-nix-image-hello.tar"
DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize("suffix", ["", ":latest"])
def test_an_archive_in_the_store(suffix: str) -> None:
    found = reference.parse(f"nix:0{STORE_PATH}{suffix}")
    assert isinstance(found, reference.ArchiveReference)
    assert found.path == found.store_path == STORE_PATH
    assert reference.canonical(found) == f"nix:0{STORE_PATH}:latest"


def test_an_archive_elsewhere() -> None:
    found = reference.parse("nix:0/tmp/nix-hello-image.tar:latest")
    assert found == reference.ArchiveReference("/tmp/nix-hello-image.tar", None)
    assert str(found) == "nix:0/tmp/nix-hello-image.tar:latest"


def test_another_store_dir_decides_what_is_a_store_path() -> None:
    other = "/srv/store" + STORE_PATH.removeprefix("/nix/store")
    found = reference.parse(f"nix:0{other}", "/srv/store")
    assert isinstance(found, reference.ArchiveReference)
    assert found.store_path == other
    assert reference.parse(f"nix:0{STORE_PATH}", "/srv/store") == reference.ArchiveReference(STORE_PATH, None)


@pytest.mark.parametrize(
    "text",
    [
        "nix:0",
        "nix:0:latest",
        "nix:0/",
        "nix:0/:latest",
        "nix:0//tmp/x",
        "nix:0/tmp/../etc/shadow",
        "nix:0/tmp/./x",
        "nix:0/tmp/x/",
        "nix:0/tmp/x\n",
        "nix:0/tmp/\x00x",
        "nix:0/tmp/x:v1",
        "nix:0/tmp/x:latest:latest",
        f"nix:0/tmp/x@{DIGEST}",
        "nix:0/" + "a" * 5000,
        "nix:0/nix/store",
        "nix:0/nix/store/x.tar",
        "nix:0/nix/store/../../etc/shadow",
        f"nix:0{STORE_PATH}/inside",
        f"nix:0{STORE_PATH}:v2",
    ],
)
def test_what_is_no_archive_reference(text: str) -> None:
    with pytest.raises(errors.InvalidArgumentError):
        reference.parse(text)


def test_the_zero_may_be_forgotten_but_is_told() -> None:
    text = f"nix:{STORE_PATH}"
    assert reference.is_archive(text)
    with pytest.raises(errors.InvalidArgumentError, match="its 0 is missing") as caught:
        reference.parse(text)
    assert caught.value.hint == f"write 'nix:0{STORE_PATH}'"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        (f"nix:0{STORE_PATH}:latest", True),
        ("nix:0/tmp/a/b.tar:latest", True),
        ("nix:0/tmp/Capitals.tar:latest", False),
        ("nix:0/tmp/a+b.tar:latest", False),
        ("docker.io/library/a:1", True),
    ],
)
def test_names_that_cri_can_look_for(name: str, known: bool) -> None:
    assert reference.is_known_to_registries(name) is known


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("team/app", "docker.io/team/app:latest"),
        ("docker.io/app", "docker.io/library/app:latest"),
        ("index.docker.io/app", "docker.io/library/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app:2", "localhost:5000/app:2"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
        ("Host/app", "Host/app:latest"),
        (f"app@{DIGEST}", f"docker.io/library/app@{DIGEST}"),
        (f"app:1@{DIGEST}", f"docker.io/library/app@{DIGEST}"),
        ("a__b/c-d.e", "docker.io/a__b/c-d.e:latest"),
        ("nix:0relative.tar", "docker.io/library/nix:0relative.tar"),
        ("nix/store", "docker.io/nix/store:latest"),
    ],
)
def test_registry_references_have_dockers_short_forms(text: str, name: str) -> None:
    assert reference.canonical(reference.parse(text)) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":1",
        "App",
        "team/App",
        "a//b",
        "a/",
        "/a",
        "a..b",
        "a___b",
        "-a",
        "a:",
        "a:.x",
        "a:" + "t" * 129,
        "a\n",
        "a:1\n",
        "a@sha256:00",
        f"a@{DIGEST}\n",
        "a@sha512:" + "0" * 128,
        "0" * 64,
        "ex_ample.com/a",
        "a/" + "b" * 260,
        "café",
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="is not an image reference"):
        reference.parse(text)


@given(st.text(max_size=60) | st.from_regex(r"(nix:0)?[a-z0-9./:@_-]{0,60}", fullmatch=True))
def test_canonical_names_are_stable(text: str) -> None:
    try:
        found = reference.parse(text)
    except errors.InvalidArgumentError:
        return
    name = reference.canonical(found)
    again = reference.parse(name)
    assert reference.canonical(again) == name
    assert type(again) is type(found)
    assert name.isprintable()
