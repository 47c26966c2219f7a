"""The bridge of pods that are taken away with their node."""

import pytest

from nixlet.host import network
from nixlet.node.lifecycle import uninstall


@pytest.mark.parametrize(("members", "stays"), [(0, False), (3, False), (1_000_000, True)])
async def test_it_goes_when_the_kernel_has_taken_the_pods_interfaces_away(
    monkeypatch: pytest.MonkeyPatch, members: int, *, stays: bool
) -> None:
    """That takes a moment; what somebody else has there stays."""
    monkeypatch.setattr(uninstall, "_INTERFACES_TIMEOUT", 0.3 if stays else 600)
    is_there = True

    def remove(name: str) -> bool:
        nonlocal members, is_there
        assert name == "nixlet0"
        members -= members > 0
        is_there = is_there and members > 0
        return not is_there

    monkeypatch.setattr(network, "remove_bridge", remove)
    monkeypatch.setattr(network, "bridge_exists", lambda _: is_there)
    await uninstall._remove_bridge("nixlet0")
    assert is_there == stays
