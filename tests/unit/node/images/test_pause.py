"""The pause image's program: what is static, read from real programs and from headers made here."""

import shutil
import struct
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.images import archive, platforms
from nixlet.node.images import pause


def elf(*kinds: int, bits: int = 64, order: str = "<") -> bytes:
    """An ELF file's header and its program headers, of which only the kinds count."""
    identification = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1 if order == "<" else 2, 1, *bytes(9)])
    size, fields = (56, "HHIQQQIHHHHHH") if bits == 64 else (32, "HHIIIIIHHHHHH")
    start = 16 + struct.calcsize(order + fields)
    header = struct.pack(order + fields, 2, 62, 1, 0, start, 0, 0, start, size, len(kinds), 0, 0, 0)
    return identification + header + b"".join(struct.pack(f"{order}I", kind).ljust(size, b"\0") for kind in kinds)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_program_with_a_loader_is_not_static(bits: int, order: str) -> None:
    assert pause.is_static(elf(6, 1, 2, bits=bits, order=order))
    assert not pause.is_static(elf(6, 3, 1, bits=bits, order=order))


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF\x05\x01" + bytes(60), elf(1)[:-56]])
def test_what_is_no_whole_program_is_not_static(content: bytes) -> None:
    assert not pause.is_static(content)


def test_real_programs(tmp_path: Path) -> None:
    catatonit = shutil.which("catatonit")
    assert catatonit is not None
    with pause.image_archive(catatonit, str(tmp_path)) as file, archive.open_archive(file) as source:
        # It has no name, so that nothing stays of it whoever is killed.
        assert list(tmp_path.iterdir()) == []
        assert source.image(platforms.host_platform()) is not None
    with (
        pytest.raises(
            errors.UnsupportedError, match=r"/bin/sh can't hold a pod's namespaces: it is no statically linked"
        ),
        pause.image_archive("/bin/sh", str(tmp_path)),
    ):
        pass
    with (
        pytest.raises(
            errors.FailedPreconditionError, match=r"can't be written to /no/images: No such file or directory$"
        ),
        pause.image_archive(catatonit, "/no/images"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
