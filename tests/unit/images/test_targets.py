"""What a hostile image's record leads to."""

import json
from collections.abc import Sequence

import pytest

from nixlet import errors
from nixlet.images import model, platforms, targets
from support import image_archives

INDEX = "application/vnd.oci.image.index.v1+json"


class Contents:
    """containerd's content.

    Attributes:
        asked: How many blobs were read.
    """

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self.asked = 0

    def add(self, text: bytes) -> bytes:
        self._blobs[image_archives.digest(text)] = text
        return text

    def index(self, entries: Sequence[bytes], kind: str = INDEX) -> bytes:
        described = [image_archives.descriptor(kind, each) for each in entries]
        return self.add(json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": described}).encode())

    async def read_content(self, digest: str, most: int) -> bytes:
        self.asked += 1
        assert self.asked < 10_000
        return self._blobs[digest][:most]


async def test_indexes_that_name_each_other_again_and_again_are_left_off() -> None:
    """Of each of these, a hundred times a hundred times a hundred are to be read."""
    contents = Contents()
    index = contents.index([b"nothing"])
    for _ in range(3):
        index = contents.index([index] * 100)
    digest = image_archives.digest(index)
    with pytest.raises(errors.NotFoundError, match="has no image for"):
        await targets.manifest_of(contents, digest, platforms.host_platform())  # type: ignore[arg-type]  # what is asked
    assert await targets.manifests_of(contents, digest) == []  # type: ignore[arg-type]  # as above
    assert contents.asked <= 2 * (1 + 1000)


async def test_of_a_blob_that_is_no_manifest_little_is_read() -> None:
    contents = Contents()
    large = contents.add(b" " * (model.MAX_JSON_BYTES + 1000))
    read: list[int] = []

    async def read_content(digest: str, most: int) -> bytes:
        found = await Contents.read_content(contents, digest, most)
        read.append(len(found))
        return found

    contents.read_content = read_content  # type: ignore[method-assign]  # to see how much it is
    index = contents.index([large], "application/octet-stream")
    assert await targets.manifests_of(contents, image_archives.digest(index)) == []  # type: ignore[arg-type]  # as above
    assert read == [len(index), model.MAX_JSON_BYTES + 1]
