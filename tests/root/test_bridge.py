"""A bridge with the address of other pods."""

import subprocess
from collections.abc import Iterator

import pytest

from nixlet import errors
from nixlet.host import network
from nixlet.node.ownership import claims

BRIDGE = "nixtest98"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def _bridge() -> Iterator[None]:
    ip("link", "add", BRIDGE, "type", "bridge")
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "del", "nixtest98a"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


@pytest.mark.parametrize(
    ("old", "new"),
    [("10.201.0.1/24", "10.202.0.0/24"), ("10.201.0.1/24", "10.201.0.0/16"), ("fd01::1/64", "fd01::/48")],
)
@pytest.mark.usefixtures("_bridge")
def test_other_addresses_wait_until_the_pods_of_the_old_ones_are_gone(old: str, new: str) -> None:
    claims.clear_gateway(BRIDGE, new, ours=True)
    ip("address", "add", old, "dev", BRIDGE)
    ip("link", "set", BRIDGE, "up")
    assert [str(each) for each in network.addresses(BRIDGE)] == [old]
    claims.check_gateway(BRIDGE, old.replace("::1/", "::/").replace(".0.1/", ".0.0/"))
    ip("link", "add", "nixtest98a", "type", "veth", "peer", "name", "nixtest98b")
    ip("link", "set", "nixtest98a", "master", BRIDGE)
    with pytest.raises(errors.FailedPreconditionError, match=f"{BRIDGE} has the address {old}, and pods of {new} need"):
        claims.clear_gateway(BRIDGE, new, ours=True)
    ip("link", "del", "nixtest98a")
    # Not ours to remove.
    with pytest.raises(errors.FailedPreconditionError):
        claims.clear_gateway(BRIDGE, new, ours=False)
    claims.clear_gateway(BRIDGE, new, ours=True)
    assert not network.bridge_exists(BRIDGE)
