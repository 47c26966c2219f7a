"""Compressed archives where there is no room for what they expand to."""

import gzip
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.images import archive, builder, model
from support import image_archives as made

SIZE = 10 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of 10 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def compressed(path: Path, size: int) -> str:
    path.write_bytes(gzip.compress(made.tar(made.oci([bytes(size)])) + bytes(size)))
    return str(path)


@pytest.mark.parametrize("size", [2 * SIZE, SIZE - (200 << 10)], ids=["far too much", "all that others need"])
def test_no_room_to_expand(tmp_path: Path, small: Path, size: int) -> None:
    path = compressed(tmp_path / "image.tar", size)
    with (
        pytest.raises(errors.ResourceExhaustedError) as caught,
        archive.open_archive(path, scratch_dir=str(small)),
    ):
        pass
    assert caught.value.message == f"{path} can't be expanded in {small}: No space left on device"
    assert os.listdir(small) == []
    # With room it goes on.
    with archive.open_archive(compressed(tmp_path / "less.tar", SIZE // 2), scratch_dir=str(small)):
        assert os.listdir(small) == []


def test_no_room_for_an_image_that_is_built(tmp_path: Path, small: Path) -> None:
    base = tmp_path / "base.tar"
    base.write_bytes(made.tar(made.oci([os.urandom(2 * SIZE)])))
    request = builder.BuildRequest(model.ContainerConfig(), (), from_image=str(base))
    with pytest.raises(errors.ResourceExhaustedError) as caught:
        builder.build_image(request, f"{small}/out.tar")
    assert caught.value.message == f"can't write the image archive {small}/out.tar: No space left on device"
    assert caught.value.hint.startswith("make room")
    assert os.listdir(small) == []


@pytest.mark.parametrize("piped", [False, True], ids=["expanded", "copied"])
def test_a_full_directory_for_temporary_files_is_named(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, *, piped: bool
) -> None:
    """What comes through a pipe leaves others as much room as what is expanded."""
    monkeypatch.setattr(tempfile, "tempdir", str(small))
    argv = ["head", "-c", str(SIZE - (200 << 10)), "/dev/zero"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        source = writer.stdout.fileno() if piped else compressed(tmp_path / "image.tar", SIZE - (200 << 10))
        done = "copied to" if piped else "expanded in"
        with pytest.raises(errors.ResourceExhaustedError, match=f"can't be {done} {small}: No space left") as caught:
            archive.open_archive(source, piped=piped).__enter__()
        writer.kill()
    assert caught.value.hint == f"make room in {small}, or name another directory: TMPDIR"
    assert os.listdir(small) == []
