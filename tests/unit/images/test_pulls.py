"""When a pull is done: as soon as CRI knows the image by the names that it got."""

import types

import pytest

from nixlet import errors
from nixlet.images import pulls

NEW, OLD = f"sha256:{'1' * 64}", f"sha256:{'0' * 64}"


class LateCri:
    """CRI, which knows the new image, and learns of its names some calls later."""

    def __init__(self, *before: str | None) -> None:
        self._before = list(before)
        self.asked: list[str] = []

    async def status(self, reference: str) -> object:
        self.asked.append(reference)
        known = NEW if reference == NEW or not self._before else self._before.pop(0)
        return None if known is None else types.SimpleNamespace(id=known)


@pytest.mark.parametrize("before", [(), (None, None), (OLD, OLD, OLD)], ids=["at once", "new name", "name of another"])
async def test_a_pull_waits_for_the_name(before: tuple[str | None, ...]) -> None:
    images = LateCri(*before)
    await pulls.wait_for_cri(images, NEW, ["nix:0/tmp/a.tar:latest"])  # type: ignore[arg-type]  # all that is asked
    assert images.asked == ["nix:0/tmp/a.tar:latest"] * (len(before) + 1)


async def test_what_cri_cant_look_for_is_found_by_its_id() -> None:
    images = LateCri()
    await pulls.wait_for_cri(images, NEW, ["nix:0/tmp/A.tar:latest", "docker.io/library/a:1"])  # type: ignore[arg-type]  # as above
    assert images.asked == ["docker.io/library/a:1", NEW]


async def test_waiting_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulls, "_CRI_TIMEOUT", 0.05)
    images = LateCri(*[OLD] * 1000)
    with pytest.raises(errors.UnavailableError, match="does not show the image docker"):
        await pulls.wait_for_cri(images, NEW, ["docker.io/library/a:1"])  # type: ignore[arg-type]  # as above
