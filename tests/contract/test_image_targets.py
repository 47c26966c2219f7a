"""What records of images lead to, in a real containerd: manifests, and indexes of several forms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.images import model, targets
from support import containerds, image_archives

MACHINE = model.Platform("amd64", "linux")


def platform(architecture: str, system: str = "linux", **more: str) -> dict[str, Any]:
    return {"platform": {"architecture": architecture, "os": system, **more}}


async def test_the_form_for_this_machine(tmp_path: Path) -> None:
    made = {name: image_archives.image([], architecture=name, Labels={}) for name in ("amd64", "386", "s390x", "arm64")}
    own, old, foreign, missing = (made[name][0] for name in ("amd64", "386", "s390x", "arm64"))
    entry: Callable[..., dict[str, Any]] = image_archives.entry
    told = [entry(missing, **platform("arm64")), entry(old, **platform("386")), entry(own, **platform("amd64"))]
    attestation = entry(foreign, **platform("unknown", "unknown"))
    inner = image_archives.index_json(entry(foreign, **platform("s390x")), entry(own, **platform("amd64")))
    nested = image_archives.descriptor(model.OCI_INDEX, inner)
    indexes = {
        "told": (image_archives.index_json(*told, attestation), own),
        "second best": (image_archives.index_json(attestation, *told[:2]), old),
        "untold": (image_archives.index_json(entry(foreign), entry(own)), own),
        "nested": (image_archives.index_json(nested), own),
        "best is gone": (image_archives.index_json(entry(b"gone", **platform("amd64")), told[1]), old),
    }
    content = [blob for name in ("amd64", "386", "s390x") for blob in made[name][1].values()]
    none = image_archives.index_json(attestation, told[0])
    async with containerds.filled(tmp_path, *content, inner, none, *(index for index, _ in indexes.values())) as store:
        for name, (index, wanted) in indexes.items():
            found = await targets.manifest_of(store, image_archives.digest(index), MACHINE)
            assert found == model.decode(wanted, model.Manifest, name), name
        plain = await targets.manifest_of(store, image_archives.digest(own), MACHINE)
        assert plain == model.decode(own, model.Manifest, "plain")
        for gone in (none, b"gone"):
            with pytest.raises(errors.NotFoundError):
                await targets.manifest_of(store, image_archives.digest(gone), MACHINE)
        assert len(await targets.manifests_of(store, image_archives.digest(indexes["told"][0]))) == 3
