"""The network of a node's pods is learned from the cluster once, and remembered."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.host import network
from nixlet.kubeclient import resources
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.kubeclient.client import Client
from nixlet.kubeclient.endpoint import Endpoint
from nixlet.node.cluster.network import podnetwork
from nixlet.node.settings import config


@pytest.fixture
def layout(tmp_path: Path) -> config.Layout:
    (tmp_path / "data" / "agent").mkdir(parents=True)
    return config.Layout(f"{tmp_path}/data", f"{tmp_path}/state")


class Answers:
    """What the API server says of the node, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *said: dict[str, Any] | errors.NixletError) -> None:
        self.left = list(said)
        self.asked: list[str] = []

        async def get(_: object, resource: resources.Resource, name: str) -> dict[str, Any]:
            self.asked.append(resource.path(name=name))
            found = self.left.pop(0) if len(self.left) > 1 else self.left[0]
            if isinstance(found, errors.NixletError):
                raise found
            return found

        monkeypatch.setattr(AsyncClient, "get", get)
        monkeypatch.setattr(podnetwork, "_PAUSE", 0.001)
        monkeypatch.setattr(podnetwork, "_LATER", 0.001)


@contextlib.asynccontextmanager
async def kept(layout: config.Layout, had: list[str]) -> AsyncIterator[asyncio.Event]:
    first = asyncio.Event()
    client = AsyncClient(Client(Endpoint.of("https://x")))
    there = podnetwork.to_use(layout, "nixlet-none")

    async def routed() -> int:
        assert podnetwork.remembered(layout) == ""
        return 1450

    def have(cidr: str, mtu: int) -> None:
        had.append(f"{cidr} {mtu}")

    keeping = asyncio.create_task(podnetwork.keep(layout, "n", there, client, routed, have, first))
    try:
        yield first
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


def given(cidr: str) -> dict[str, Any]:
    return {"spec": {"podCIDR": cidr}}


async def test_it_is_had_when_the_node_has_been_given_one(
    layout: config.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Answers(
        monkeypatch, errors.NotFoundError("x"), errors.UnavailableError("y"), {"spec": {}}, given("10.42.3.0/24")
    )
    had: list[str] = []
    assert podnetwork.remembered(layout) == ""
    async with kept(layout, had) as first:
        await asyncio.wait_for(first.wait(), 10)
        assert (podnetwork.remembered(layout), podnetwork.remembered_mtu(layout)) == ("10.42.3.0/24", 1450)
        count = len(said.asked)
        while len(said.asked) < count + 5:
            await asyncio.sleep(0.001)
    assert had == ["10.42.3.0/24 1450"]
    assert set(said.asked) == {"/api/v1/nodes/n"}


async def test_the_next_start_knows_it(
    layout: config.Layout, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(layout.agent, "pod-network.json")
    path.write_text('{"node":"n","pod_cidr":"10.42.3.0/24"}')
    assert podnetwork.remembered_mtu(layout) == 0
    podnetwork.remember_mtu(layout, 1450)
    said = Answers(monkeypatch, given("10.42.3.0/24"), given("10.42.5.0/24"))
    had: list[str] = []
    async with kept(layout, had) as first:
        await asyncio.wait_for(first.wait(), 1)
        while len(said.asked) < 4:
            await asyncio.sleep(0.001)
    # A network that pods are in isn't changed under them, and not by the next start either as long as one is there.
    assert had == []
    assert caplog.messages == [
        "pods of this node have addresses of 10.42.3.0/24, and the cluster has given it 10.42.5.0/24 since"
    ]
    assert podnetwork.remembered(layout) == "10.42.3.0/24"
    members = ["veth1"]
    monkeypatch.setattr(network, "bridge_members", lambda bridge: members if bridge == "nixlet-none" else [])
    assert podnetwork.to_use(layout, "nixlet-none") == "10.42.3.0/24"
    members.clear()
    assert podnetwork.to_use(layout, "nixlet-none") == "10.42.5.0/24"
    async with kept(layout, had):
        count = len(said.asked)
        while len(said.asked) < count + 3:
            await asyncio.sleep(0.001)
    assert podnetwork.remembered(layout) == podnetwork.to_use(layout, "x") == "10.42.5.0/24"
    assert json.loads(path.read_text()) == {"node": "n", "pod_cidr": "10.42.5.0/24", "routed_mtu": 1450, "later": ""}
    assert had == []
    assert len(caplog.messages) == 1


async def test_what_is_waited_for_in_vain_is_told_once(
    layout: config.Layout, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cluster whose controllers give no networks to nodes, for one."""
    monkeypatch.setattr(podnetwork, "_PATIENCE", 0.0)
    said = Answers(monkeypatch, errors.NotFoundError("x"), errors.NotFoundError("x"), {"spec": {}})
    async with kept(layout, []) as first:
        while len(said.asked) < 6:
            await asyncio.sleep(0.001)
        assert not first.is_set()
    assert caplog.messages == [
        "pods have no addresses, and the node isn't ready: the cluster doesn't know the node n yet, which its kubelet tells it of",
        "pods have no addresses, and the node isn't ready: the cluster has given the node n no network for its pods yet",
    ]


async def test_each_time_that_the_cluster_is_away_is_told(
    layout: config.Layout, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away, there = errors.UnavailableError("y"), given("10.42.3.0/24")
    said = Answers(monkeypatch, away, away, there, away, away, there, away, there)
    async with kept(layout, []):
        while len(said.left) > 1:
            await asyncio.sleep(0.001)
    assert caplog.messages == [
        "the network of this node's pods can't be had yet: y",
        *["whether pods of this node are to get others than those of 10.42.3.0/24 isn't known: y"] * 2,
    ]


@pytest.mark.parametrize("text", ["{", "{}", '{"node":"n","pod_cidr":"x"}', '{"node":"n","pod_cidr":3}'])
def test_a_damaged_memory_is_told(layout: config.Layout, text: str) -> None:
    path = Path(layout.agent, "pod-network.json")
    path.write_text(text)
    with pytest.raises(errors.FailedPreconditionError, match=f"{path} doesn't say") as caught:
        podnetwork.remembered(layout)
    assert "remove the file" in caught.value.hint
