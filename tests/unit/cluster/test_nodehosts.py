import ipaddress
from typing import Any

import pytest

from nixlet.cluster import nodehosts


def node(*addresses: tuple[str, str]) -> dict[str, Any]:
    return {"metadata": {"name": "n"}, "status": {"addresses": [{"type": k, "address": a} for k, a in addresses]}}


def ips(*texts: str) -> tuple[Any, ...]:
    return tuple(map(ipaddress.ip_address, texts))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (node(("Hostname", "n"), ("InternalIP", "192.0.2.1"), ("InternalIP", "192.0.2.2")), ips("192.0.2.1")),
        (node(("InternalIP", "fd00::1"), ("InternalIP", "192.0.2.1")), ips("fd00::1", "192.0.2.1")),
        (node(("ExternalIP", "192.0.2.1"), ("InternalIP", "none\nevil")), ()),
        ({"metadata": {"name": "n"}}, ()),
        ({"metadata": {"name": "n"}, "status": {"addresses": None}}, ()),
    ],
)
def test_where_a_node_is(given: dict[str, Any], found: tuple[Any, ...]) -> None:
    assert nodehosts.addresses(given) == found


def test_nodes_come_and_go_and_people_s_lines_stay() -> None:
    text = nodehosts.with_nodes("", {"b": ips("192.0.2.2"), "a": ips("192.0.2.1", "fd00::1")})
    assert text == "192.0.2.1 a # node\nfd00::1 a # node\n192.0.2.2 b # node\n"
    own = "# mine\n192.0.2.9 registry registry.example\n192.0.2.8 printer"
    text = nodehosts.with_nodes(f"{own}\n{text}", {"b": ips("192.0.2.3")})
    assert text == f"{own}\n192.0.2.3 b # node\n"
    assert nodehosts.with_nodes(text, {"b": ips("192.0.2.3")}) == text
    assert nodehosts.with_nodes(text, {}) == f"{own}\n"


def test_what_k3s_wrote_for_a_node_is_not_there_twice() -> None:
    text = nodehosts.with_nodes("192.0.2.1 a\n192.0.2.7 gone\n", {"a": ips("192.0.2.2")})
    assert text == "192.0.2.7 gone\n192.0.2.2 a # node\n"
