"""What stays of pulls whose layers can't be taken, in a real containerd; they come and go in an order that is chosen here."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.containerd import imagestore
from nixlet.images import archive, closurecheck, model, registrypulls
from nixlet.store import closures
from support import containerds, image_archives

NAME = "localhost/a:1"

NOTES = {closures.CLOSURE: f"/nix/store/{'0' * 32}-closure-info"}
NEW, NEW_BLOBS = image_archives.image([b"new"], annotations=[NOTES])
OLD, OLD_BLOBS = image_archives.image([b"old"])
DIGEST = image_archives.digest(NEW)


class Refusal(closurecheck.ClosureCheck):
    """As if all layers had another closure; ``asked`` is set when one was looked at."""

    def __init__(self) -> None:
        super().__init__(containerds.SNAPSHOTTER, None)
        self.asked = asyncio.Event()

    async def take_unpacked(self, containerd: imagestore.ImageStore, layer: archive.Layer, chain_id: str) -> bool:
        self.asked.set()
        raise errors.FailedPreconditionError(f"{layer.diff_id} of {chain_id} has another closure")


async def record(store: imagestore.ImageStore, manifest: bytes) -> str:
    """Record an image as CRI's pull does; its ID."""
    image_id = model.decode(manifest, model.Manifest, "it").config.digest
    digest = image_archives.digest(manifest)
    for name in (NAME, f"localhost/a@{digest}", image_id):
        await store.put_image(name, imagestore.Descriptor(model.OCI_MANIFEST, digest, len(manifest)), {})
    return image_id


async def records(store: imagestore.ImageStore) -> dict[str, str]:
    return {each.name: each.target.digest for each in await store.images()}


@pytest.mark.parametrize("old", [None, OLD], ids=["a new name", "a name that was another's"])
async def test_pulls_at_once_leave_nothing(tmp_path: Path, old: bytes | None) -> None:
    """The second begins when the first one's records are there, and makes them again when they have gone."""
    async with containerds.filled(tmp_path, *NEW_BLOBS.values(), *OLD_BLOBS.values()) as store:
        if old is not None:
            await record(store, old)
        before = await records(store)
        looks = registrypulls.RegistryPulls(store, Refusal())
        async with contextlib.AsyncExitStack() as second:
            async with looks.watched(NAME) as check:
                image_id = await record(store, NEW)
                check_second = await second.enter_async_context(looks.watched(NAME))
                with pytest.raises(errors.FailedPreconditionError, match="another closure"):
                    await check(image_id)
            assert await records(store) == before
            await record(store, NEW)
            with pytest.raises(errors.FailedPreconditionError, match="another closure"):
                await check_second(image_id)
        assert await records(store) == before


async def test_what_was_there_stays_though_it_is_refused(tmp_path: Path) -> None:
    async with containerds.filled(tmp_path, *NEW_BLOBS.values()) as store:
        image_id = await record(store, NEW)
        before = await records(store)
        looks = registrypulls.RegistryPulls(store, Refusal())
        with pytest.raises(errors.FailedPreconditionError, match="another closure"):
            async with looks.watched(NAME) as check:
                await check(image_id)
        assert await records(store) == before


async def test_a_pull_that_is_given_up_is_looked_at(tmp_path: Path) -> None:
    """Also when its client goes while it is looked at."""
    async with containerds.filled(tmp_path, *NEW_BLOBS.values()) as store:
        refusal = Refusal()
        looks = registrypulls.RegistryPulls(store, refusal)
        recorded = asyncio.Event()

        async def pull(*, answered: bool) -> None:
            async with looks.watched(NAME) as check:
                image_id = await record(store, NEW)
                recorded.set()
                if answered:
                    await check(image_id)
                await asyncio.Event().wait()

        for answered, until in ((False, recorded), (True, refusal.asked)):
            until.clear()
            pulling = asyncio.create_task(pull(answered=answered))
            await until.wait()
            pulling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pulling
            assert await records(store) == {}
