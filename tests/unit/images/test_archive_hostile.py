"""Archives that are damaged, or made to do harm."""

import gzip
import io
import json
import os
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nixlet import errors
from nixlet.images import archive, expand, model, tarball
from support import image_archives as made

AMD64 = model.Platform("amd64", "linux")


def read_all(path: str) -> list[bytes]:
    """All that a loader reads."""
    with archive.open_archive(path) as source:
        image = source.image(AMD64)
        blobs = [image.descriptor, image.manifest.config, *image.manifest.layers]
        found = []
        for each in blobs:
            with source.open_blob(each.digest) as blob:
                found.append(blob.read())
        return found


@pytest.fixture
def refuse(tmp_path: Path) -> Callable[[bytes, str], None]:
    def check(data: bytes, why: str) -> None:
        path = tmp_path / "image.tar"
        path.write_bytes(data)
        with pytest.raises(errors.InvalidArgumentError, match=why) as caught:
            read_all(str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert os.listdir(tmp_path) == ["image.tar"]

    return check


@pytest.mark.parametrize("files", [made.oci(), made.docker({"layer.tar": b"x" * 1000})])
def test_every_truncation_is_noticed(tmp_path: Path, files: dict[str, bytes]) -> None:
    whole = made.tar(files)
    end = len(whole.rstrip(b"\x00"))
    end += -end % 512
    path = tmp_path / "cut.tar"
    for length in [*range(0, end + 1, 512), 1, 511, 513, end + 511]:
        path.write_bytes(whole[:length])
        with pytest.raises(
            errors.InvalidArgumentError, match="it is no tar file" if length < 512 else "ends too early"
        ):
            read_all(str(path))
    path.write_bytes(whole[: end + 512])
    assert read_all(str(path))


@pytest.mark.parametrize("form", made.COMPRESSIONS)
def test_every_truncation_of_a_compressed_archive_is_noticed(tmp_path: Path, form: str) -> None:
    whole = made.COMPRESSIONS[form](made.tar(made.oci([os.urandom(200_000)])))
    path = tmp_path / "cut.tar"
    # zstd's library takes a cut for the end: what is left of the tar file tells.
    why = "ends too early|it is no tar file" if form == "zst" else "ends too early"
    for length in range(6, len(whole) - 10, 997):
        path.write_bytes(whole[:length])
        with pytest.raises(errors.InvalidArgumentError, match=why):
            read_all(str(path))
    assert os.listdir(tmp_path) == ["cut.tar"]


@pytest.mark.parametrize("form", made.COMPRESSIONS)
def test_damage_in_a_compressed_archive_is_noticed(refuse: Callable[[bytes, str], None], form: str) -> None:
    whole = bytearray(made.COMPRESSIONS[form](made.tar(made.oci([os.urandom(200_000)]))))
    whole[len(whole) // 2 : len(whole) // 2 + 64] = bytes(64)
    refuse(bytes(whole), "is not an image archive|has another digest")


def test_a_zstd_window_that_would_take_all_memory(refuse: Callable[[bytes, str], None]) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=0)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    refuse(packer.compress(made.tar(made.oci())) + packer.flush(), "is not an image archive.*too much memory")


def test_nobody_wants_it_any_more(tmp_path: Path) -> None:
    path = tmp_path / "image.tar"
    stop = threading.Event()
    path.write_bytes(made.tar(made.oci()))
    with archive.open_archive(str(path), stop=stop) as source:
        (layer,) = source.image(AMD64).layers
        stop.set()
        with (
            pytest.raises(errors.CallCancelledError, match="is not wanted any more"),
            source.open_blob(layer.descriptor.digest) as blob,
        ):
            blob.read()
    path.write_bytes(gzip.compress(path.read_bytes()))
    with (
        pytest.raises(errors.CallCancelledError, match="is not wanted any more"),
        archive.open_archive(str(path), stop=stop),
    ):
        pass


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"root:x:0:0:root:/root:/bin/bash\n" * 40, "is not an image archive: it is no tar file"),
        (b"\x00" * 10240, "it is empty"),
        (b"\x1f\x8bnot really", "is not an image archive"),
        (gzip.compress(b"hello"), "it is no tar file"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 600, "is not an image archive: zstd"),
        (b"\xfd7zXZ\x00" + b"x" * 600, "compressed with xz"),
        (made.tar({"hello": b"x"}), "neither index.json nor manifest.json"),
        (made.tar({"index.json": made.index_json()}), "it holds no image"),
        (made.tar({"manifest.json": b"[]"}), "it holds no image"),
        (made.tar({"index.json": b"{"}), "the image index is malformed"),
        (made.tar({"manifest.json": b"[" * 200_000}), "manifest.json is malformed"),
        (made.tar({"index.json": b" " * (model.MAX_JSON_BYTES + 1)}), "index.json is larger than 4194304 bytes"),
        (made.tar({"manifest.json": b"[]"}, links=[made.link("index.json", "index.json")]), "has no file 'index.json'"),
        (made.tar({}, links=[made.link("index.json", "a"), made.link("a", "index.json")]), "has no file 'index.json'"),
        (made.tar({}, links=[made.link("index.json", "/etc/passwd")]), "has no file 'index.json'"),
        (made.tar({}, links=[made.link("index.json", "../../../etc/passwd")]), "has no file 'index.json'"),
        (made.tar({}, links=[made.link("index.json", "../etc/passwd", tarfile.LNKTYPE)]), "has no file 'index.json'"),
        (made.tar([("index.json", b"{}"), ("./index.json", b"[]")]), "two files 'index.json' that differ"),
        (made.tar([(f"f{number}", b"") for number in range(tarball.MAX_MEMBERS + 1)]), "more than 10000 members"),
        (made.tar({"a" * 70_000: b""}), "extended header is too large"),
    ],
)
def test_what_is_no_archive(refuse: Callable[[bytes, str], None], data: bytes, why: str) -> None:
    refuse(data, why)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "config.json/../../x", "", ".", "missing", "loop"])
@pytest.mark.parametrize("field", ["Config", "Layers"])
def test_names_that_lead_outside(refuse: Callable[[bytes, str], None], field: str, name: str) -> None:
    files = made.docker({"layer.tar": b"x"})
    manifest = json.loads(files["manifest.json"])
    manifest[0][field] = [name] if field == "Layers" else name
    files["manifest.json"] = json.dumps(manifest).encode()
    outside = [("../../etc/passwd", b"{}"), ("/etc/passwd", b"{}")]
    refuse(made.tar([*files.items(), *outside], links=[made.link("loop", "loop")]), "has no file")


def test_equal_duplicates_are_no_harm(tmp_path: Path) -> None:
    files = made.docker({"a/layer.tar": b"same"})
    path = tmp_path / "image.tar"
    path.write_bytes(made.tar([*files.items(), ("a/layer.tar", b"same"), ("./a/layer.tar", b"same")]))
    assert b"same" in read_all(str(path))


@pytest.mark.parametrize("place", range(3))
def test_content_with_another_digest(refuse: Callable[[bytes, str], None], place: int) -> None:
    files = made.oci([b"a layer"])
    blobs = [name for name in files if name.startswith("blobs/")]
    data = files[blobs[place]]
    # The manifest, the configuration, the layer: a byte is changed that keeps JSON well-formed.
    changed = data.replace(b'": ', b'":\t', 1) if data.startswith(b"{") else data[:-1] + bytes([data[-1] ^ 1])
    refuse(made.tar({**files, blobs[place]: changed}), "has another digest")


def test_a_docker_layer_that_isnt_what_the_configuration_says(refuse: Callable[[bytes, str], None]) -> None:
    refuse(made.tar({**made.docker({"layer.tar": b"one"}), "layer.tar": b"two"}), "has another digest")


def test_no_content_is_handed_out_whole_before_it_is_checked(tmp_path: Path) -> None:
    files = made.docker({"layer.tar": b"good"})
    path = tmp_path / "image.tar"
    path.write_bytes(made.tar({**files, "layer.tar": b"evil"}))
    with archive.open_archive(str(path)) as source:
        layer = source.image(AMD64).layers[0]
        with source.open_blob(layer.descriptor.digest) as blob, pytest.raises(errors.InvalidArgumentError):
            blob.read(4)


def test_what_is_named_again_and_again_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = tarball.Tarball.read

    def read(self: tarball.Tarball, member: tarball.Member, offset: int, length: int) -> bytes:
        data = real(self, member, offset, length)
        reads.append(len(data))
        return data

    monkeypatch.setattr(tarball.Tarball, "read", read)
    manifest, blobs = made.image([b"a layer"])
    path = tmp_path / "image.tar"
    path.write_bytes(made.tar({"index.json": made.index_json(*[made.entry(manifest)] * 900), **blobs}))
    with archive.open_archive(str(path)) as source:
        assert len(source.images(AMD64)) == 1
    assert len(reads) < 10
    reads.clear()
    packed = gzip.compress(os.urandom(100_000))
    files = made.docker({"layer.tar": packed})
    (entry,) = json.loads(files["manifest.json"])
    path.write_bytes(made.tar({**files, "manifest.json": json.dumps([entry] * 200).encode()}))
    with archive.open_archive(str(path)) as source:
        assert len(source.images(AMD64)) == 1
    assert reads.count(len(packed)) == 1


def test_many_manifests_are_no_larger_than_such_are(
    refuse: Callable[[bytes, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = made.image([b"one"]), made.image([b"two"])
    index = made.index_json(made.entry(one[0]), made.entry(two[0]))
    monkeypatch.setattr(archive, "_MAX_TEXT", len(index) + len(one[0]) + len(two[0]) + 300)
    refuse(made.tar({"index.json": index, **one[1], **two[1]}), "its manifests and configurations have more than")


def test_sizes_and_counts_that_dont_fit(refuse: Callable[[bytes, str], None]) -> None:
    manifest, blobs = made.image([b"one"])
    wrong = made.entry(manifest)
    wrong["size"] += 1
    refuse(made.tar({"index.json": made.index_json(wrong), **blobs}), "another size than its descriptor")
    config = made.config_json([])
    lonely = json.loads(manifest)
    lonely["config"] = made.descriptor(model.OCI_CONFIG, config)
    text = json.dumps(lonely).encode()
    files = {"index.json": made.index_json(made.entry(text)), **blobs, made.blob(text): text, made.blob(config): config}
    refuse(made.tar(files), "its 1 layers don't fit the 0 of its configuration")
    odd = manifest.replace(b"layer.v1.tar+gzip", b"layer.v1.tar+gzip+encrypted")
    refuse(
        made.tar({"index.json": made.index_json(made.entry(odd)), **blobs, made.blob(odd): odd}), "can't be unpacked"
    )


def test_indexes_nested_without_end(refuse: Callable[[bytes, str], None]) -> None:
    manifest, files = made.image([b"one"])
    index = made.index_json(made.entry(manifest))
    for _ in range(6):
        files[made.blob(index)] = index
        index = made.index_json({**made.entry(index), "mediaType": model.OCI_INDEX})
    refuse(made.tar({"index.json": index, **files}), "nested too deep")


@pytest.mark.parametrize("innermost", [1, 0])
def test_an_index_that_multiplies(refuse: Callable[[bytes, str], None], innermost: int) -> None:
    manifest, files = made.image([b"one"])
    index = made.index_json(*[made.entry(manifest)] * innermost)
    for _ in range(4):
        files[made.blob(index)] = index
        index = made.index_json(*[{**made.entry(index), "mediaType": model.OCI_INDEX}] * 100)
    refuse(made.tar({"index.json": index, **files}), "more than 1000 entries")


def test_sparse_members_are_refused(refuse: Callable[[bytes, str], None]) -> None:
    info = tarfile.TarInfo("index.json")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": str(2**60)}
    refuse(made.tar({}, links=[info]), "sparse member")
    old = tarfile.TarInfo("index.json")
    old.type = tarfile.GNUTYPE_SPARSE
    refuse(made.tar({}, links=[old]), "sparse member")


@pytest.mark.parametrize("size", [2**33, 2**62, 2**80])
def test_a_size_beyond_the_file_reserves_no_memory(tmp_path: Path, size: int) -> None:
    header = bytearray(tarfile.TarInfo("index.json").tobuf())
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\x00 " % sum(header)
    path = tmp_path / "big.tar"
    path.write_bytes(bytes(header) + b"\x00" * 1024)
    tracemalloc.start()
    try:
        with pytest.raises(errors.InvalidArgumentError, match="ends too early"):
            read_all(str(path))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_an_archive_that_expands_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[bytes, str], None]
) -> None:
    monkeypatch.setattr(expand, "MAX_EXPANDED_BYTES", 2**20)
    refuse(gzip.compress(made.tar({"a": b"\x00" * 2**21})), "expands to more than 1048576 bytes")


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(errors.InvalidArgumentError, match="is not an image archive"):
        read_all(str(path))


WHOLE = made.tar(made.oci())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_give_the_same_image_or_an_error(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    path = tmp_path / "changed.tar"
    path.write_bytes(data)
    try:
        blobs = read_all(str(path))
    except errors.InvalidArgumentError:
        return
    assert blobs == list(_expected())


def _expected() -> list[bytes]:
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as source:
        found = {name: source.extractfile(name) for name in source.getnames() if name.startswith("blobs/")}
        return [file.read() for file in found.values() if file is not None]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=2048))
def test_any_bytes_give_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(data)
    with pytest.raises(errors.InvalidArgumentError):
        read_all(str(path))
