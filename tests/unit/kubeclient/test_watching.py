"""What a watch tells, how it ends, and how one goes on for ever; and the client for the event loop."""

import asyncio
import contextlib
import json
import threading
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from typing import cast

import pytest

from nixlet import errors
from nixlet.cluster.settings import ClusterSettings
from nixlet.kubeclient import asynchronous, calls, failures, following, resources
from nixlet.kubeclient.client import Client
from nixlet.kubeclient.endpoint import Endpoint
from support import apiservers
from support.apiservers import Asked, Reply


def event(kind: str, name: str, version: int) -> bytes:
    made = {"type": kind, "object": {"metadata": {"name": name, "resourceVersion": str(version)}}}
    return json.dumps(made).encode() + b"\n"


def gone() -> bytes:
    status = {"kind": "Status", "message": "too old resource version: 1 (9)", "reason": "Expired", "code": 410}
    return json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"


def queried(asked: Asked) -> dict[str, str]:
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(asked.path).query))


def test_events_come_one_by_one_however_they_are_cut(cluster: ClusterSettings) -> None:
    text = event("ADDED", "a", 2) + event("MODIFIED", "ä", 3) + event("BOOKMARK", "", 9) + event("DELETED", "a", 10)
    cuts = [text[number : number + 7] for number in range(0, len(text), 7)]
    with (
        apiservers.serving(lambda _: Reply(pieces=iter(cuts)), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
    ):
        found = list(client.watch(resources.PODS, version="1", namespace="x", labels="a=b", seconds=20))
    assert [(each.kind, each.version) for each in found] == [
        ("ADDED", "2"),
        ("MODIFIED", "3"),
        ("BOOKMARK", "9"),
        ("DELETED", "10"),
    ]
    assert server.asked[0].path.startswith("/api/v1/namespaces/x/pods?")
    assert queried(server.asked[0]) == {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": "1",
        "labelSelector": "a=b",
        "timeoutSeconds": "20",
    }


@pytest.mark.parametrize("inside", [True, False])
def test_a_version_that_is_forgotten_is_told_as_such(cluster: ClusterSettings, inside: bool) -> None:
    status = {"kind": "Status", "message": "too old", "reason": "Expired", "code": 410}
    reply = Reply(pieces=iter([gone()])) if inside else Reply(410, json.dumps(status).encode())
    with (
        apiservers.serving(lambda _: reply, apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
        pytest.raises(failures.ExpiredError, match="too old"),
    ):
        list(client.watch(resources.PODS, version="1"))


@pytest.mark.parametrize("text", [b"<html>\n", b'{"type":"ADDED"}\n', b'{"type":"ERROR","object":{"code":"x"}}\n'])
def test_events_that_are_none(cluster: ClusterSettings, text: bytes) -> None:
    with (
        apiservers.serving(lambda _: Reply(pieces=iter([text])), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
        pytest.raises(errors.UnavailableError, match="no object of Kubernetes'"),
    ):
        list(client.watch(resources.PODS, version="1"))


def test_an_event_without_an_end_is_refused(cluster: ClusterSettings) -> None:
    def pieces() -> Iterator[bytes]:
        while True:
            yield b" " * (1 << 20)

    with (
        apiservers.serving(lambda _: Reply(pieces=pieces()), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
        pytest.raises(errors.ResourceExhaustedError, match="more than 16 MiB"),
    ):
        list(client.watch(resources.PODS, version="1"))


class Api:
    """A list of one object and watches that a test writes."""

    def __init__(self) -> None:
        self.version = 1
        self.watches: list[list[bytes]] = []
        self.versions: list[str] = []
        self.lists = 0
        self.down = 0
        self.open = threading.Event()

    def answer(self, asked: Asked) -> Reply:
        if self.down:
            self.down -= 1
            return Reply(503, b"")
        if "watch=true" not in asked.path:
            self.lists += 1
            item = {"metadata": {"name": f"of-{self.version}", "resourceVersion": str(self.version)}}
            return Reply(
                body=json.dumps({"items": [item], "metadata": {"resourceVersion": str(self.version)}}).encode()
            )
        self.versions.append(queried(asked)["resourceVersion"])
        return Reply(pieces=iter(self.watches.pop(0)) if self.watches else self._standing())

    def _standing(self) -> Iterator[bytes]:
        self.open.wait(60)
        yield event("ADDED", "late", 99)


async def test_objects_are_followed_over_ends_failures_and_forgotten_versions(
    cluster: ClusterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_FIRST_DELAY", 0.001)
    api = Api()
    api.watches = [
        [event("ADDED", "a", 2), event("BOOKMARK", "", 5)],  # ends: the next one begins at the bookmark
        [event("DELETED", "a", 6), b"<html>"],  # breaks
        [gone()],  # is forgotten: listed anew
    ]
    api.down = 2
    with apiservers.serving(api.answer, apiservers.context(cluster)) as server:
        async with asynchronous.AsyncClient(Client(apiservers.endpoint(cluster, server))) as client:
            changes = following.follow(client, resources.PODS)
            found = []
            async with contextlib.aclosing(changes):
                async for change in changes:
                    found.append((change.kind, [each["metadata"]["name"] for each in change.objects]))
                    if len(found) == 3:
                        api.version = 50
                    if len(found) == 4:
                        api.open.set()
                    if len(found) == 5:
                        break
    assert found == [
        ("LISTED", ["of-1"]),
        ("ADDED", ["a"]),
        ("DELETED", ["a"]),
        ("LISTED", ["of-50"]),
        ("ADDED", ["late"]),
    ]
    assert api.versions == ["1", "5", "6", "50"]
    assert api.lists == 2


async def test_a_request_that_is_wrong_is_not_tried_again(cluster: ClusterSettings) -> None:
    status = json.dumps({"message": "unable to parse", "code": 400}).encode()
    with apiservers.serving(lambda _: Reply(400, status), apiservers.context(cluster)) as server:
        async with asynchronous.AsyncClient(Client(apiservers.endpoint(cluster, server))) as client:
            with pytest.raises(errors.InvalidArgumentError, match="unable to parse"):
                await anext(following.follow(client, resources.PODS, labels="!!"))
    assert len(server.asked) == 1


async def test_whoever_waits_for_events_can_be_cancelled_and_the_loop_goes_on(cluster: ClusterSettings) -> None:
    api = Api()
    with apiservers.serving(api.answer, apiservers.context(cluster)) as server:
        async with asynchronous.AsyncClient(Client(apiservers.endpoint(cluster, server))) as client:

            async def watch() -> None:
                async with contextlib.aclosing(client.watch(resources.PODS, version="1")) as events:
                    await anext(events)

            waiting = asyncio.create_task(watch())
            while not api.versions:
                await asyncio.sleep(0.001)
            # Others ask meanwhile.
            assert (await client.list(resources.PODS)).version == "1"
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(waiting, 30)
        api.open.set()


async def test_watches_hold_up_no_request(cluster: ClusterSettings) -> None:
    api = Api()
    with apiservers.serving(api.answer, apiservers.context(cluster)) as server:
        async with asynchronous.AsyncClient(Client(apiservers.endpoint(cluster, server))) as client:
            watching = [asyncio.ensure_future(anext(client.watch(resources.PODS, version="1"))) for _ in range(33)]
            while len(api.versions) < 33:
                await asyncio.sleep(0.01)
            assert (await asyncio.wait_for(client.list(resources.PODS), 30)).version == "1"
            api.open.set()
            assert {(await each).version for each in watching} == {"99"}


class Holding:
    """A server that answers when it may."""

    def __init__(self) -> None:
        self.asked = 0
        self.open = threading.Event()

    def answer(self, _: Asked) -> Reply:
        self.asked += 1
        self.open.wait(60)
        return Reply()


@contextlib.asynccontextmanager
async def held(cluster: ClusterSettings, seconds: float) -> AsyncIterator[asynchronous.AsyncClient]:
    """A client whose only thread is taken by a request that isn't answered."""
    there = Holding()
    with apiservers.serving(there.answer, apiservers.context(cluster)) as server:
        try:
            async with asynchronous.AsyncClient(
                Client(apiservers.endpoint(cluster, server), seconds=seconds)
            ) as client:
                first = asyncio.create_task(client.get(resources.NODES, "first"))
                while not there.asked:
                    await asyncio.sleep(0.001)
                yield client
            await asyncio.gather(first, return_exceptions=True)
            assert there.asked == 1
        finally:
            there.open.set()


async def test_who_waits_for_its_turn_can_be_cancelled(
    cluster: ClusterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asynchronous, "_MAX_REQUESTS", 1)
    async with held(cluster, 60) as client:
        waiting = asyncio.create_task(client.get(resources.NODES, "second"))
        await asyncio.sleep(0.01)
        waiting.cancel()
        done, _ = await asyncio.wait([waiting], timeout=20)
        assert done
        assert waiting.cancelled()


async def test_who_waits_for_its_turn_is_told_when_its_time_is_over(
    cluster: ClusterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asynchronous, "_MAX_REQUESTS", 1)
    async with held(cluster, 60) as client:
        client.client.seconds = 0.2
        with pytest.raises(errors.DeadlineExceededError, match=r"can't be asked within 0\.2 s: 1 requests go on"):
            await asyncio.wait_for(client.get(resources.NODES, "second"), 20)


async def test_who_waits_for_its_turn_is_given_up_with_the_client(
    cluster: ClusterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asynchronous, "_MAX_REQUESTS", 1)
    async with held(cluster, 60) as client:
        waiting = asyncio.create_task(client.get(resources.NODES, "second"))
        await asyncio.sleep(0.01)
    with pytest.raises(errors.CallCancelledError):
        await asyncio.wait_for(waiting, 20)


def test_the_time_of_waiting_is_the_first_request_s() -> None:
    call = calls.Call()
    call.begin(4.0)
    assert call.until(100.0, 10.0) == 106.0
    assert call.until(100.0, 10.0) == 110.0


async def test_a_server_may_be_away_for_days(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        asked = 0

        async def list(self, *_: object, **__: object) -> None:
            self.asked += 1
            if self.asked == 1200:
                raise errors.InvalidArgumentError("that is enough")
            raise errors.UnavailableError("away")

    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    away = Away()
    with pytest.raises(errors.InvalidArgumentError, match="enough"):
        await anext(following.follow(cast("asynchronous.AsyncClient", away), resources.NODES))
    assert pauses[:3] == [0.5, 1.0, 2.0]
    assert set(pauses[8:]) == {30.0}


async def test_the_client_s_end_gives_up_what_goes_on(cluster: ClusterSettings) -> None:
    api = Api()
    with apiservers.serving(api.answer, apiservers.context(cluster)) as server:
        async with asynchronous.AsyncClient(Client(apiservers.endpoint(cluster, server))) as client:
            waiting = asyncio.ensure_future(anext(client.watch(resources.PODS, version="1")))
            while not api.versions:
                await asyncio.sleep(0.001)
        with pytest.raises(errors.CallCancelledError):
            await asyncio.wait_for(waiting, 30)
        api.open.set()


async def test_all_methods_for_the_loop(cluster: ClusterSettings) -> None:
    with apiservers.serving(lambda _: Reply(), apiservers.context(cluster)) as server:
        async with asynchronous.AsyncClient(Client(apiservers.endpoint(cluster, server))) as client:
            await client.get(resources.NODES, "n")
            await client.list(resources.NODES, labels="a")
            await client.create(resources.PODS, {}, namespace="x")
            await client.patch(resources.NODES, "n", {})
            await client.apply(resources.NODES, "n", {}, force=False)
            await client.delete(resources.NODES, "n")
            await client.check()
            assert await client.raw("/version") == b"{}"
    assert [(each.method, urllib.parse.urlsplit(each.path).path) for each in server.asked] == [
        ("GET", "/api/v1/nodes/n"),
        ("GET", "/api/v1/nodes"),
        ("POST", "/api/v1/namespaces/x/pods"),
        ("PATCH", "/api/v1/nodes/n"),
        ("PATCH", "/api/v1/nodes/n"),
        ("DELETE", "/api/v1/nodes/n"),
        ("GET", "/readyz"),
        ("GET", "/version"),
    ]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(body=b"ok"), ""),
        (Reply(body=b'{"health":"true","reason":""}'), ""),
        (
            Reply(500, b"[+]ping ok\n[-]etcd failed: reason withheld\n[-]informer-sync failed: x\nreadyz check failed\n"),
            "the API server at {} isn't ready: etcd, informer-sync",
        ),
        (
            Reply(500, b"".join(b"[-]check-%d failed\n" % number for number in range(8))),
            "the API server at {} isn't ready: check-0, check-1, check-2, check-3, check-4 and 3 more",
        ),
        (Reply(503, b'{"health":"false","reason":"RAFT NO LEADER"}'), "the API server at {} isn't well: RAFT NO LEADER"),
        (Reply(200, b'{"health":"false"}'), "the API server at {} isn't well: it says no more"),
        (Reply(500, b"internal\x00 error"), "internal error"),
    ],
)  # fmt: skip
def test_programs_say_how_they_are(reply: Reply, message: str) -> None:
    with apiservers.serving(lambda _: reply, None) as server, Client(Endpoint.of(server.url("http"))) as client:
        if not message:
            client.check("/healthz")
            return
        with pytest.raises(errors.UnavailableError) as caught:
            client.check("/healthz")
    assert caught.value.message == message.format(server.url("http"))
