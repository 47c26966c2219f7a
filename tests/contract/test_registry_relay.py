"""The relay between containerd and registries, with a registry that wants tokens and one that redirects: faults on command."""

import contextlib
import dataclasses
import re
from collections.abc import AsyncIterator
from urllib.parse import parse_qs

import aiohttp
import pytest
from aiohttp import web

from nixlet.containerd import registries
from nixlet.services import registry_relay

BLOB = bytes(range(256)) * 8192

TOKEN = "token-for-proj"

LOGIN = aiohttp.encode_basic_auth("ada", "secret")


@dataclasses.dataclass
class Server:
    """A registry that speaks HTTP, on a real socket.

    Attributes:
        url: Its endpoint.
        asked: What was asked of it: method, path, and the authorization that came along.
    """

    url: str = ""
    asked: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    wants: str = "nothing"

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        authorization = request.headers.get("Authorization", "")
        self.asked.append((request.method, request.path_qs, authorization))
        base = self.url.removesuffix("/v2")
        if request.path == "/token":
            return await self._token(request, authorization)
        if self.wants == "bearer" and authorization != f"Bearer {TOKEN}":
            challenge = f'Bearer realm="{base}/token",service="tests",scope="repository:proj/app:pull"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        if self.wants == "basic" and authorization != LOGIN:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="tests"'})
        if request.path.endswith("/blobs/sha256:near"):
            raise web.HTTPTemporaryRedirect("/v2/proj/app/blobs/sha256:blob")
        if request.path.endswith("/blobs/sha256:far"):
            raise web.HTTPTemporaryRedirect("https://content.invalid/blob")
        if request.path.endswith("/blobs/sha256:circle"):
            raise web.HTTPTemporaryRedirect(request.path)
        if "range" in request.headers:
            return web.Response(status=206, body=BLOB[10:20], headers={"Content-Range": f"bytes 10-19/{len(BLOB)}"})
        return web.Response(body=BLOB, headers={"Docker-Content-Digest": "sha256:blob"})

    async def _token(self, request: web.Request, authorization: str) -> web.Response:
        if request.method == "POST":
            form = parse_qs(await request.text())
            good = form.get("refresh_token") == ["identity"] and form["grant_type"] == ["refresh_token"]
            return web.json_response({"access_token": TOKEN}, status=200 if good else 401)
        good = authorization == LOGIN
        assert request.query["scope"] == "repository:proj/app:pull"
        return web.json_response({"token": TOKEN, "expires_in": 60}, status=200 if good else 401)


@contextlib.asynccontextmanager
async def serving(answering: Server) -> AsyncIterator[None]:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answering.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        answering.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v2"
        yield
    finally:
        await runner.cleanup()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    async with serving(made):
        yield made


@pytest.fixture
async def relay() -> AsyncIterator[registry_relay.RegistryRelay]:
    async with registry_relay.serve() as made:
        yield made


@pytest.fixture
async def containerd() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def endpoint(server: Server, auth: registries.Auth | None = None) -> registries.Endpoint:
    rewrites = (registries.Rewrite(re.compile("^team/"), "proj/"),)
    return registries.Endpoint(
        server.url, "127.0.0.1", config=registries.HostConfig(auth=auth), rewrites=rewrites, override_path=False
    )


async def test_names_change_and_all_else_passes(
    server: Server, relay: registry_relay.RegistryRelay, containerd: aiohttp.ClientSession
) -> None:
    url = relay.url_for(endpoint(server))
    async with containerd.get(f"{url}/team/app/blobs/sha256:blob?ns=registry.invalid") as answer:
        assert answer.status == 200
        assert answer.headers["Docker-Content-Digest"] == "sha256:blob"
        assert answer.headers["Content-Length"] == str(len(BLOB))
        assert await answer.read() == BLOB
    async with containerd.head(f"{url}/other/app/manifests/1") as answer:
        assert answer.headers["Content-Length"] == str(len(BLOB))
    assert server.asked == [
        ("GET", "/v2/proj/app/blobs/sha256:blob?ns=registry.invalid", ""),
        ("HEAD", "/v2/other/app/manifests/1", ""),
    ]


async def test_a_part_of_a_blob(
    server: Server, relay: registry_relay.RegistryRelay, containerd: aiohttp.ClientSession
) -> None:
    url = relay.url_for(endpoint(server))
    async with containerd.get(f"{url}/team/app/blobs/sha256:blob", headers={"Range": "bytes=10-19"}) as answer:
        assert (answer.status, await answer.read()) == (206, BLOB[10:20])
        assert answer.headers["Content-Range"] == f"bytes 10-19/{len(BLOB)}"


@pytest.mark.parametrize(
    "path",
    [
        "team/app/uploads/x",
        "team/app/manifests/a/b",
        "../app/manifests/1",
        "TEAM/app/manifests/1",
        "_catalog",
        "%2e%2e/x",
    ],
)
async def test_what_no_pull_asks_is_not_found(
    server: Server, relay: registry_relay.RegistryRelay, containerd: aiohttp.ClientSession, path: str
) -> None:
    url = relay.url_for(endpoint(server))
    async with containerd.get(f"{url}/{path}") as answer:
        assert answer.status == 404
    assert server.asked == []


async def test_nobody_gets_in_without_the_secret_and_nothing_is_pushed(
    server: Server, relay: registry_relay.RegistryRelay, containerd: aiohttp.ClientSession
) -> None:
    wanted = endpoint(server)
    url = relay.url_for(wanted)
    key = url.split("/")[-2]
    for other in ("x", key[:-1], f"{key}x"):
        async with containerd.get(f"{url.replace(key, other)}/team/app/manifests/1") as answer:
            assert answer.status == 404
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        async with containerd.request(method, f"{url}/team/app/manifests/1") as answer:
            assert answer.status == 405
    relay.forget_others(set())
    async with containerd.get(f"{url}/team/app/manifests/1") as answer:
        assert answer.status == 404
    assert server.asked == []
    assert relay.url_for(wanted) != url


@pytest.mark.parametrize(
    ("wants", "auth", "calls"),
    [
        ("basic", registries.Auth("ada", "secret"), ["/v2/proj/app/manifests/1"] * 2),
        ("basic", registries.Auth(auth="YWRhOnNlY3JldA=="), ["/v2/proj/app/manifests/1"] * 2),
        (
            "bearer",
            registries.Auth("ada", "secret"),
            ["/v2/proj/app/manifests/1", "/token", "/v2/proj/app/manifests/1"],
        ),
        (
            "bearer",
            registries.Auth(identity_token="identity"),
            ["/v2/proj/app/manifests/1", "/token", "/v2/proj/app/manifests/1"],
        ),
    ],
)
async def test_credentials_open_what_asks_for_them_and_are_remembered(
    server: Server,
    relay: registry_relay.RegistryRelay,
    containerd: aiohttp.ClientSession,
    wants: str,
    auth: registries.Auth,
    calls: list[str],
) -> None:
    server.wants = wants
    url = relay.url_for(endpoint(server, auth))
    async with containerd.get(f"{url}/team/app/manifests/1") as answer:
        assert answer.status == 200
    assert [path.partition("?")[0] for path in server.paths] == calls
    server.asked.clear()
    async with containerd.get(f"{url}/team/app/manifests/1") as answer:
        assert answer.status == 200
    assert len(server.asked) == 1


@pytest.mark.parametrize("wants", ["basic", "bearer"])
async def test_wrong_credentials_end_there(
    server: Server, relay: registry_relay.RegistryRelay, containerd: aiohttp.ClientSession, wants: str
) -> None:
    server.wants = wants
    url = relay.url_for(endpoint(server, registries.Auth("ada", "wrong")))
    async with containerd.get(f"{url}/team/app/manifests/1") as answer:
        assert answer.status == 401
        assert "WWW-Authenticate" not in answer.headers


async def test_who_has_none_is_left_to_containerds(
    server: Server, relay: registry_relay.RegistryRelay, containerd: aiohttp.ClientSession
) -> None:
    """A pod's own pull secret goes through: the challenge to containerd, its answer to the registry."""
    server.wants = "basic"
    url = relay.url_for(endpoint(server))
    async with containerd.get(f"{url}/team/app/manifests/1") as answer:
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == 'Basic realm="tests"'
    async with containerd.get(f"{url}/team/app/manifests/1", headers={"Authorization": LOGIN}) as answer:
        assert answer.status == 200


async def test_redirects_within_the_registry_are_followed_and_others_handed_on(
    server: Server, relay: registry_relay.RegistryRelay, containerd: aiohttp.ClientSession
) -> None:
    server.wants = "basic"
    url = relay.url_for(endpoint(server, registries.Auth("ada", "secret")))
    async with containerd.get(f"{url}/team/app/blobs/sha256:near", allow_redirects=False) as answer:
        assert await answer.read() == BLOB
    async with containerd.get(f"{url}/team/app/blobs/sha256:far", allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (307, "https://content.invalid/blob")
    async with containerd.get(f"{url}/team/app/blobs/sha256:circle", allow_redirects=False) as answer:
        assert answer.status == 502
        assert "redirects in a circle" in await answer.text()


async def test_a_registry_that_is_down(relay: registry_relay.RegistryRelay, containerd: aiohttp.ClientSession) -> None:
    """containerd goes on to the next one."""
    url = relay.url_for(registries.Endpoint("http://127.0.0.1:9/v2"))
    async with containerd.get(f"{url}/team/app/manifests/1") as answer:
        assert answer.status == 502
        assert "could not be asked" in await answer.text()


async def test_certificates_that_are_missing(
    relay: registry_relay.RegistryRelay, containerd: aiohttp.ClientSession
) -> None:
    tls = registries.Tls(ca_file="/nowhere/ca.crt")
    url = relay.url_for(registries.Endpoint("https://127.0.0.1:9/v2", config=registries.HostConfig(tls=tls)))
    async with containerd.get(f"{url}/team/app/manifests/1") as answer:
        assert answer.status == 502
