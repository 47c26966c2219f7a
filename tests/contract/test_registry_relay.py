"""The relay between containerd and registries, with a registry that wants tokens and one that redirects: faults on command."""

import asyncio
import contextlib
import dataclasses
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import aiohttp
import pytest
from aiohttp import web

from nixlet.containerd import hosts, registries, rewrites
from nixlet.host import proxies
from nixlet.services import registry_relay
from support import registries as real_registries

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
    elsewhere: str = "https://content.invalid"
    asked: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    wants: str = "nothing"
    #: Whether everybody gets a token.
    open: bool = False
    #: Who asked by it as by a proxy.
    proved: list[str] = dataclasses.field(default_factory=list)
    #: What whoever wants a token is answered before: a status, and where it is said to be.
    detour: tuple[int, str] = (0, "")

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        authorization = request.headers.get("Authorization", "")
        self.asked.append((request.method, request.path_qs, authorization))
        if proof := request.headers.get("Proxy-Authorization"):
            self.proved.append(proof)
        base = self.url.removesuffix("/v2")
        if request.path == "/token" and self.detour[0]:
            return web.Response(status=self.detour[0], headers={"Location": f"{self.detour[1]}?{request.query_string}"})
        if request.path in {"/token", "/moved"}:
            return await self._token(request, authorization)
        if self.wants == "bearer" and authorization != f"Bearer {TOKEN}":
            challenge = f'Bearer realm="{base}/token",service="tests",scope="repository:proj/app:pull"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        if self.wants not in {"nothing", "basic", "bearer"}:
            return web.Response(status=401, headers={"WWW-Authenticate": self.wants})
        if self.wants == "basic" and authorization != LOGIN:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="tests"'})
        if request.path.endswith("/blobs/sha256:near"):
            raise web.HTTPTemporaryRedirect("/v2/proj/app/blobs/sha256:blob")
        if request.path.endswith("/blobs/sha256:far"):
            raise web.HTTPTemporaryRedirect(f"{self.elsewhere}/blob")
        if request.path.endswith("/blobs/sha256:nowhere"):
            raise web.HTTPTemporaryRedirect("mailto:ada@example.com")
        if request.path.endswith(("/blobs/sha256:cut", "/blobs/sha256:cutchunked")):
            return await self._cut(request)
        if request.path.endswith("/blobs/sha256:circle"):
            raise web.HTTPTemporaryRedirect(request.path)
        if "range" in request.headers:
            return web.Response(status=206, body=BLOB[10:20], headers={"Content-Range": f"bytes 10-19/{len(BLOB)}"})
        return web.Response(body=BLOB, headers={"Docker-Content-Digest": "sha256:blob"})

    async def _cut(self, request: web.Request) -> web.StreamResponse:
        """An answer that breaks off."""
        begun = web.StreamResponse()
        if request.path.endswith("cut"):
            begun.content_length = len(BLOB)
        else:
            begun.enable_chunked_encoding()
        await begun.prepare(request)
        await begun.write(BLOB[:1000])
        assert request.transport is not None
        request.transport.close()
        return begun

    async def _token(self, request: web.Request, authorization: str) -> web.Response:
        if request.method == "POST":
            form = parse_qs(await request.text())
            good = form.get("refresh_token") == ["identity"] and form["grant_type"] == ["refresh_token"]
            return web.json_response({"access_token": TOKEN}, status=200 if good else 401)
        good = authorization in {LOGIN, ""} if self.open else authorization == LOGIN
        assert request.query["scope"] == "repository:proj/app:pull"
        return web.json_response({"token": TOKEN, "expires_in": 60}, status=200 if good else 401)


@contextlib.asynccontextmanager
async def serving(answering: Server, context: ssl.SSLContext | None = None) -> AsyncIterator[None]:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answering.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        answering.url = f"http{'s' if context else ''}://127.0.0.1:{runner.addresses[0][1]}/v2"
        yield
    finally:
        await runner.cleanup()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    async with serving(made):
        yield made


SOURCE = "/etc/nixlet/registries.yaml"


@pytest.fixture
async def relay() -> AsyncIterator[registry_relay.RegistryRelay]:
    async with registry_relay.serve(SOURCE, proxies.Proxies()) as made:
        yield made


class Containerd:
    """Asks as containerd does: with the endpoint's headers, and with credentials when it is asked for them.

    Attributes:
        status: The last answer's.
        reason: What its status line says.
        headers: Its headers.
    """

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self.status, self.reason = 0, ""
        self.headers: Any = {}

    async def ask(
        self,
        way: hosts.Way,
        path: str,
        *,
        method: str = "GET",
        login: str = "",
        identity: str = "",
        headers: dict[str, str] | None = None,
    ) -> bytes:
        """The body of an answer."""
        sent, body = {**way.headers, **(headers or {})}, b""
        for last in (False, True):
            async with self._session.request(
                method, f"{way.url}/{path}", headers=sent, allow_redirects=False
            ) as answer:
                self.status, self.reason, self.headers = answer.status, str(answer.reason), answer.headers
                challenge = answer.headers.get("WWW-Authenticate", "")
                body = await answer.read()
            if last or answer.status != 401 or not challenge:
                break
            realm = re.findall('^Bearer realm="([^"]+)"', challenge)[0]
            sent["Authorization"] = f"Bearer {await self._token(realm, login, identity)}"
        return body

    async def _token(self, realm: str, login: str, identity: str) -> str:
        """containerd tries OAuth's form first where it has something to show."""
        if identity:
            form = {"grant_type": "refresh_token", "refresh_token": identity}
            call = self._session.post(realm, data=form)
        else:
            call = self._session.get(realm, headers={"Authorization": login} if login else {})
        async with call as answer:
            token: str = (await answer.json())["token"]
            return token


@pytest.fixture
async def containerd() -> AsyncIterator[Containerd]:
    async with aiohttp.ClientSession() as session:
        yield Containerd(session)


def endpoint(
    server: Server, auth: registries.Auth | None = None, tls: registries.Tls | None = None
) -> registries.Endpoint:
    found = (rewrites.Rewrite(re.compile("^team/"), "proj/"),)
    config = registries.HostConfig(auth=auth, tls=tls)
    return registries.Endpoint(server.url, "registry.example", config=config, rewrites=found)


ADA = registries.Auth("ada", "secret")


async def test_names_change_and_all_else_passes(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd
) -> None:
    way = relay.way_to(endpoint(server))
    assert await containerd.ask(way, "team/app/blobs/sha256:blob?ns=registry.invalid") == BLOB
    assert containerd.headers["Docker-Content-Digest"] == "sha256:blob"
    assert containerd.headers["Content-Length"] == str(len(BLOB))
    await containerd.ask(way, "other/app/manifests/1", method="HEAD")
    assert containerd.headers["Content-Length"] == str(len(BLOB))
    assert server.asked == [
        ("GET", "/v2/proj/app/blobs/sha256:blob?ns=registry.invalid", ""),
        ("HEAD", "/v2/other/app/manifests/1", ""),
    ]


async def test_a_part_of_a_blob(server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd) -> None:
    way = relay.way_to(endpoint(server))
    part = await containerd.ask(way, "team/app/blobs/sha256:blob", headers={"Range": "bytes=10-19"})
    assert (containerd.status, part) == (206, BLOB[10:20])
    assert containerd.headers["Content-Range"] == f"bytes 10-19/{len(BLOB)}"


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
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd, path: str
) -> None:
    await containerd.ask(relay.way_to(endpoint(server)), path)
    assert containerd.status == 404
    assert server.asked == []


async def test_nobody_gets_in_without_the_secret_and_nothing_is_pushed(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd
) -> None:
    wanted = endpoint(server, ADA)
    way = relay.way_to(wanted)
    (secret,) = way.headers.values()
    # Errors, events and logs have URLs.
    assert secret not in way.url
    for other in ("", "x", secret[:-1], f"{secret}x"):
        await containerd.ask(hosts.Way(way.url, {registry_relay.HEADER: other}), "team/app/manifests/1")
        assert containerd.status == 404
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        await containerd.ask(way, "team/app/manifests/1", method=method)
        assert containerd.status == 405
    relay.forget_others(set())
    await containerd.ask(way, "team/app/manifests/1")
    assert containerd.status == 404
    assert server.asked == []
    assert relay.way_to(wanted) != way


async def test_a_pull_goes_on_while_its_mirrors_text_changes(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd
) -> None:
    """By the names that it began with, and with what is said of the host now."""
    server.wants = "basic"
    before = endpoint(server, registries.Auth("ada", "old"))
    way = relay.way_to(before)
    now = dataclasses.replace(endpoint(server, ADA), rewrites=())
    assert relay.way_to(now) != way
    relay.forget_others({now})
    assert await containerd.ask(way, "team/app/blobs/sha256:blob") == BLOB
    assert server.paths[-1] == "/v2/proj/app/blobs/sha256:blob"
    # A new password is a new way for nobody; one that was taken away opens nothing.
    assert relay.way_to(before) == way
    relay.forget_others({endpoint(server)})
    await containerd.ask(way, "team/app/blobs/sha256:blob")
    assert containerd.status == 401
    relay.forget_others({registries.Endpoint("http://127.0.0.1:9/v2")})
    await containerd.ask(way, "team/app/blobs/sha256:blob")
    assert containerd.status == 404


async def test_nobody_makes_a_login_be_forgotten(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd
) -> None:
    """Tokens are given to whoever asks: they are what was shown, and take no room here."""
    server.wants = "basic"
    way = relay.way_to(endpoint(server))
    realm = re.findall("^http://[^/]+", way.url)[0] + "/token"
    async with aiohttp.ClientSession() as session:
        async with session.get(realm, headers={"Authorization": LOGIN}) as answer:
            token = (await answer.json())["token"]
        for _ in range(1100):
            async with session.get(realm) as answer:
                assert answer.status == 200
        async with session.post(realm, data={"username": "ada", "password": "x" * 100_000}) as answer:
            assert answer.status == 413
    assert await containerd.ask(way, "team/app/manifests/1", headers={"Authorization": f"Bearer {token}"}) == BLOB
    await containerd.ask(way, "team/app/manifests/1", headers={"Authorization": "Bearer nixlet.nonsense"})
    assert containerd.status == 401
    assert [authorization for _, _, authorization in server.asked] == ["", LOGIN, ""]


async def test_long_credentials_are_credentials(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd
) -> None:
    """Those of clouds are tokens of thousands of characters."""
    server.wants = "basic"
    long = aiohttp.encode_basic_auth("ada", "x" * 6000)
    await containerd.ask(relay.way_to(endpoint(server)), "team/app/manifests/1", login=long)
    assert containerd.reason == "registry.example refuses the credentials that came with the pull"
    assert server.asked[-1][2] == long


@pytest.mark.parametrize(
    ("wants", "auth"),
    [
        ("basic", ADA),
        ("basic", registries.Auth(auth="YWRhOnNlY3JldA==")),
        ("bearer", ADA),
        ("bearer", registries.Auth(identity_token="identity")),
    ],
)
async def test_credentials_open_what_asks_for_them_and_are_remembered(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd, wants: str, auth: registries.Auth
) -> None:
    server.wants = wants
    way = relay.way_to(endpoint(server, auth))
    assert await containerd.ask(way, "team/app/manifests/1") == BLOB
    opened = ["/v2/proj/app/manifests/1"] * 2 + ["/token"] * (wants == "bearer") + ["/v2/proj/app/manifests/1"]
    assert [path.partition("?")[0] for path in server.paths] == opened
    server.asked.clear()
    assert await containerd.ask(way, "team/app/manifests/1") == BLOB
    assert len(server.asked) == 2


@pytest.mark.parametrize("wants", ["basic", "bearer"])
@pytest.mark.parametrize("ours", [None, registries.Auth("ada", "wrong"), ADA])
async def test_a_pulls_own_credentials_win(
    server: Server,
    relay: registry_relay.RegistryRelay,
    containerd: Containerd,
    wants: str,
    ours: registries.Auth | None,
) -> None:
    """As a pod's imagePullSecrets do where containerd asks by itself."""
    server.wants = wants
    way = relay.way_to(endpoint(server, ours))
    assert await containerd.ask(way, "team/app/manifests/1", login=LOGIN) == BLOB
    await containerd.ask(way, "team/app/manifests/1", login=aiohttp.encode_basic_auth("ada", "wrong"))
    assert containerd.status == 401
    assert containerd.reason == "registry.example refuses the credentials that came with the pull"
    if wants == "bearer":
        assert await containerd.ask(way, "team/app/manifests/1", identity="identity") == BLOB
    # What somebody writes there by hand is handed on as it is.
    if wants == "basic":
        assert await containerd.ask(way, "team/app/manifests/1", headers={"Authorization": LOGIN}) == BLOB
        assert server.asked[-1][2] == LOGIN


@pytest.mark.parametrize("wants", ["basic", "bearer"])
@pytest.mark.parametrize(
    ("auth", "reason"),
    [
        (registries.Auth("ada", "wrong"), f"registry.example refuses the credentials that {SOURCE} has for it"),
        (registries.Auth("a:da", "secret"), f"registry.example refuses the credentials that {SOURCE} has for it"),
        (None, f"registry.example wants credentials, and {SOURCE} has none for it"),
    ],
)
async def test_a_refusal_names_the_registry_and_the_file(
    server: Server,
    relay: registry_relay.RegistryRelay,
    containerd: Containerd,
    wants: str,
    auth: registries.Auth | None,
    reason: str,
) -> None:
    """containerd's error has the URL and the status line."""
    server.wants = wants
    way = relay.way_to(endpoint(server, auth))
    body = await containerd.ask(way, "team/app/manifests/1")
    assert (containerd.status, containerd.reason) == (401, reason)
    assert reason in body.decode()
    assert "WWW-Authenticate" not in containerd.headers
    assert way.url.endswith(server.url.replace("://", "/"))


@pytest.mark.parametrize("auth", [ADA, None])
async def test_who_gives_tokens_may_have_moved(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd, auth: registries.Auth | None
) -> None:
    server.wants, server.open, server.detour = "bearer", auth is None, (307, "/moved")
    assert await containerd.ask(relay.way_to(endpoint(server, auth)), "team/app/manifests/1") == BLOB


async def test_a_token_is_asked_for_elsewhere_without_the_password(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd
) -> None:
    elsewhere = Server(open=True)
    async with serving(elsewhere):
        server.wants, server.detour = "bearer", (302, elsewhere.url.replace("/v2", "/moved"))
        assert await containerd.ask(relay.way_to(endpoint(server, ADA)), "team/app/manifests/1") == BLOB
    assert [authorization for _, _, authorization in elsewhere.asked] == [""]


async def test_no_token_is_no_refusal(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd
) -> None:
    server.wants, server.detour = "bearer", (503, "")
    await containerd.ask(relay.way_to(endpoint(server, ADA)), "team/app/manifests/1")
    assert containerd.status == 502
    assert "it gives no token: " in containerd.reason
    assert "/token answers 503" in containerd.reason


async def test_a_token_that_everybody_gets(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd
) -> None:
    server.wants, server.open = "bearer", True
    assert await containerd.ask(relay.way_to(endpoint(server)), "team/app/manifests/1") == BLOB


async def test_no_other_file_has_credentials(
    server: Server,
    relay: registry_relay.RegistryRelay,
    containerd: Containerd,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login root password roots\ndefault login root password roots\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    assert await containerd.ask(relay.way_to(endpoint(server)), "team/app/manifests/1") == BLOB
    assert [authorization for _, _, authorization in server.asked] == [""]


async def test_a_registry_is_asked_by_the_proxy(server: Server, containerd: Containerd) -> None:
    """A request to a proxy has the whole URL, and what proves us to it."""
    proxy = Server()
    async with serving(proxy):
        by = proxy.url.removesuffix("/v2").replace("://", "://ada:secret@")
        said = proxies.from_environment({"HTTP_PROXY": by, "NO_PROXY": "10.0.0.0/8"})
        async with registry_relay.serve(SOURCE, said) as relay:
            way = relay.way_to(registries.Endpoint("http://registry.invalid/v2", "registry.invalid"))
            assert await containerd.ask(way, "team/app/manifests/1") == BLOB
    assert server.asked == []
    assert proxy.paths == ["/v2/team/app/manifests/1"]
    assert proxy.proved == [LOGIN]


@contextlib.asynccontextmanager
async def saying(words: bytes, heard: list[str]) -> AsyncIterator[str]:
    """Somebody who answers every request with the same words: the host and port."""

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend((await reader.readuntil(b"\r\n\r\n")).decode().splitlines())
        writer.write(words)
        writer.close()

    async with await asyncio.start_server(answered, "127.0.0.1", 0) as made:
        yield f"127.0.0.1:{made.sockets[0].getsockname()[1]}"


async def test_a_proxy_that_refuses_is_named_without_its_password(containerd: Containerd) -> None:
    heard: list[str] = []
    async with saying(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n", heard) as place:
        said = proxies.from_environment({"HTTPS_PROXY": f"http://ada:geh%C3%A4im@{place}"})
        async with registry_relay.serve(SOURCE, said) as relay:
            await containerd.ask(relay.way_to(registries.Endpoint("https://registry.invalid/v2")), "app/manifests/1")
    assert containerd.status == 502
    assert containerd.reason.endswith(f"could not be asked: the proxy {place} answers 407 Who are you")
    assert heard[0].startswith("CONNECT registry.invalid:443")
    assert f"Proxy-Authorization: {aiohttp.encode_basic_auth('ada', 'gehäim', encoding='utf-8')}" in heard


async def test_an_answer_that_is_no_http_is_told_without_what_was_asked(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd
) -> None:
    """A redirect's query may open a store."""
    async with saying(b"nonsense\r\n\r\n", []) as place:
        server.elsewhere = f"http://{place}/signed?signature=hush#"
        await containerd.ask(relay.way_to(endpoint(server)), "team/app/blobs/sha256:far")
    assert containerd.status == 502
    assert "could not be asked: " in containerd.reason
    assert "hush" not in containerd.reason


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://127.0.0.1:9", "http://ada:secret@[", "nonsense://x"])
async def test_a_proxy_that_cannot_be_asked(containerd: Containerd, proxy: str) -> None:
    said = proxies.from_environment({"HTTP_PROXY": proxy})
    async with registry_relay.serve(SOURCE, said) as relay:
        way = relay.way_to(registries.Endpoint("http://registry.invalid/v2", "registry.invalid"))
        await containerd.ask(way, "team/app/manifests/1")
    assert containerd.status == 502
    assert "registry.invalid/v2 could not be asked: " in containerd.reason
    assert "secret" not in containerd.reason


@pytest.mark.parametrize(
    ("media_type", "form"),
    [
        ("application/x-www-form-urlencoded; charset=none", b"a=b"),
        ("application/x-www-form-urlencoded", b"\xff"),
        ("multipart/form-data", b"x"),
    ],
)
async def test_a_form_that_makes_no_sense(
    relay: registry_relay.RegistryRelay, server: Server, media_type: str, form: bytes
) -> None:
    url = re.findall("^http://[^/]+", relay.way_to(endpoint(server)).url)[0]
    asked = aiohttp.request("POST", f"{url}/token", data=form, headers={"Content-Type": media_type})
    async with asked as answer:
        assert answer.status == 400


@pytest.mark.parametrize("blob", ["cut", "cutchunked"])
async def test_an_answer_that_breaks_off_breaks_off(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd, blob: str
) -> None:
    """Nothing of ours is written into a blob, and it does not come to a good end."""
    with pytest.raises(aiohttp.ClientError):
        await containerd.ask(relay.way_to(endpoint(server)), f"team/app/blobs/sha256:{blob}")
    assert containerd.status == 200


async def test_redirects_are_followed_and_credentials_stay_behind(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd
) -> None:
    server.wants = "basic"
    way = relay.way_to(endpoint(server, ADA))
    elsewhere = Server()
    async with serving(elsewhere):
        server.elsewhere = elsewhere.url.removesuffix("/v2")
        assert await containerd.ask(way, "team/app/blobs/sha256:near") == BLOB
        assert await containerd.ask(way, "team/app/blobs/sha256:far") == BLOB
        assert elsewhere.asked == [("GET", "/blob", "")]
        assert server.asked[-1][2] == LOGIN


@pytest.mark.parametrize(
    ("blob", "reason"), [("circle", "redirects in a circle"), ("nowhere", "redirects to the scheme mailto")]
)
async def test_redirects_that_lead_nowhere(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd, blob: str, reason: str
) -> None:
    await containerd.ask(relay.way_to(endpoint(server)), f"team/app/blobs/sha256:{blob}")
    assert containerd.status == 502
    assert reason in containerd.reason


@pytest.mark.parametrize("checked", [True, False])
async def test_an_endpoints_certificates_hold_where_it_redirects_to(
    relay: registry_relay.RegistryRelay, containerd: Containerd, tmp_path: Path, checked: bool
) -> None:
    authority = await asyncio.to_thread(real_registries.Authority, tmp_path)
    certificate, key = await asyncio.to_thread(authority.issue, "registry")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    tls = registries.Tls(ca_file=str(authority.certificate)) if checked else registries.Tls(skip_verify=True)
    server, elsewhere = Server(), Server()
    async with serving(server, context), serving(elsewhere, context):
        server.elsewhere = elsewhere.url.removesuffix("/v2")
        way = relay.way_to(endpoint(server, tls=tls))
        assert await containerd.ask(way, "team/app/blobs/sha256:far") == BLOB


async def test_certificates_are_read_again_when_they_are_renewed(
    relay: registry_relay.RegistryRelay, containerd: Containerd, tmp_path: Path
) -> None:
    """Under the same names, as those who renew them do it."""
    old, new = [await asyncio.to_thread(real_registries.Authority, tmp_path / each) for each in ("old", "new")]
    certificate, key = await asyncio.to_thread(new.issue, "registry")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    (tmp_path / "ca.crt").write_bytes(old.certificate.read_bytes())
    server = Server()
    async with serving(server, context):
        way = relay.way_to(endpoint(server, tls=registries.Tls(ca_file=f"{tmp_path}/ca.crt")))
        await containerd.ask(way, "team/app/manifests/1")
        assert containerd.status == 502
        (tmp_path / "next.crt").write_bytes(new.certificate.read_bytes())
        (tmp_path / "next.crt").rename(tmp_path / "ca.crt")
        assert await containerd.ask(way, "team/app/manifests/1") == BLOB


async def test_nobody_keeps_the_relay_from_ending() -> None:
    """A request that never comes to its end; aiohttp's own patience is longer."""
    async with registry_relay.serve(SOURCE, proxies.Proxies()) as relay:
        port = int(re.findall(r":(\d+)", relay.way_to(registries.Endpoint("http://r.example/v2")).url)[0])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /token HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nusername=")
        await writer.drain()
        await asyncio.sleep(0.1)
        ending = asyncio.timeout(8)
        await ending.__aenter__()
    await ending.__aexit__(None, None, None)
    writer.close()


@pytest.mark.parametrize(
    "unusable",
    [
        registries.Endpoint("http://127.0.0.1:9/v2"),
        registries.Endpoint("https://127.0.0.1:9/v2", config=registries.HostConfig(tls=registries.Tls("/no/ca.crt"))),
    ],
)
async def test_a_registry_that_cannot_be_asked(
    relay: registry_relay.RegistryRelay, containerd: Containerd, unusable: registries.Endpoint
) -> None:
    """containerd goes on to the next one."""
    await containerd.ask(relay.way_to(unusable), "team/app/manifests/1")
    assert containerd.status == 502
    assert f"{unusable.url} could not be asked: " in containerd.reason


@pytest.mark.parametrize("challenge", ['Bearer realm="::"', 'Bearer realm="http://[/"', "Bearer", "", "Negotiate"])
async def test_a_challenge_that_makes_no_sense_is_a_refusal(
    server: Server, relay: registry_relay.RegistryRelay, containerd: Containerd, challenge: str
) -> None:
    server.wants = challenge
    await containerd.ask(relay.way_to(endpoint(server, ADA)), "team/app/manifests/1")
    assert containerd.status in {401, 502}
    assert "registry.example" in containerd.reason or server.url in containerd.reason
