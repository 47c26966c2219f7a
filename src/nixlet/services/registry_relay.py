"""A relay between containerd and registries, for what containerd can't do: other repository names, changed credentials.

It speaks what a pull needs of the distribution project's HTTP API (distribution-spec) and its token authentication, on the loopback
address. Its URLs hold a secret, so that other users of this machine can't pull with the node's credentials: containerd reads them
in files that only root can.
"""

import asyncio
import contextlib
import logging
import re
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Final

import aiohttp
import msgspec
import multidict
from aiohttp import web
from yarl import URL

from nixlet.containerd import registries

#: Bytes that are handed on at a time, and the most that the answer with a token may have.
_CHUNK: Final = 256 << 10
_MAX_TOKEN: Final = 1 << 20

#: Seconds to connect, and without a byte; a pull as a whole takes as long as it takes.
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)

_MAX_REDIRECTS: Final = 5

#: A path below an endpoint (distribution-spec, "Endpoints").
_PATH: Final = re.compile(
    r"(?P<repository>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?P<rest>/(?:manifests|blobs|referrers)/[A-Za-z0-9_+.=:-]+|/tags/list)"
)

#: Of HTTP between two neighbours (RFC 9110, 7.6.1), or set anew by each.
_NOT_HANDED_ON: Final = frozenset(
    {
        "connection",
        "host",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
    }
)

_CHALLENGE: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

_log = logging.getLogger("nixlet.registries")


class RegistryRelay:
    """Asks endpoints on behalf of containerd."""

    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self._session = session
        self._base = base
        self._keys: dict[registries.Endpoint, str] = {}
        self._endpoints: dict[str, registries.Endpoint] = {}
        self._contexts: dict[registries.Tls, ssl.SSLContext] = {}
        self._authorizations: dict[tuple[registries.Endpoint, str], str] = {}

    def url_for(self, endpoint: registries.Endpoint) -> str:
        """The URL by which containerd gets to an endpoint."""
        key = self._keys.get(endpoint)
        if key is None:
            key = self._keys[endpoint] = secrets.token_urlsafe(24)
            self._endpoints[key] = endpoint
        return f"{self._base}/{key}/v2"

    def forget_others(self, endpoints: set[registries.Endpoint]) -> None:
        """Serve no more than these endpoints."""
        for endpoint in set(self._keys) - endpoints:
            del self._endpoints[self._keys.pop(endpoint)]
        self._authorizations = {key: value for key, value in self._authorizations.items() if key[0] in endpoints}
        # Certificates are read again: their files may have changed as well.
        self._contexts.clear()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer containerd."""
        endpoint = self._endpoints.get(request.match_info["key"])
        found = _PATH.fullmatch(request.match_info["path"])
        if endpoint is None or (found is None and request.match_info["path"]):
            return web.Response(status=404, text="there is no such endpoint\n")
        repository = found["repository"] if found else ""
        for rewrite in endpoint.rewrites:
            if (changed := rewrite.apply(repository)) != repository:
                repository = changed
                break
        path = f"/{repository}{found['rest']}" if found else "/"
        # encoded: what the registry is asked is what containerd wrote, byte for byte.
        url = URL(f"{endpoint.url}{path}", encoded=True).with_query(request.query)
        headers = multidict.CIMultiDict(
            (name, value) for name, value in request.headers.items() if name.lower() not in _NOT_HANDED_ON
        )
        try:
            async with self._ask(endpoint, request.method, url, headers, repository) as answer:
                # What our credentials didn't open, containerd's don't either: its challenge would lead it astray.
                dropped = {"www-authenticate"} if answer.status == 401 and endpoint.config.auth is not None else set()
                return await _hand_on(request, answer, url, _NOT_HANDED_ON | dropped)
        except (aiohttp.ClientError, TimeoutError, OSError, ssl.SSLError) as error:
            reason = str(error) or type(error).__name__
            _log.warning("the registry %s could not be asked: %s", endpoint.url, reason)
            return web.Response(status=502, text=f"{endpoint.url} could not be asked: {reason}\n")

    @contextlib.asynccontextmanager
    async def _ask(
        self,
        endpoint: registries.Endpoint,
        method: str,
        url: URL,
        headers: "multidict.CIMultiDict[str]",
        repository: str,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An endpoint's answer, with our credentials where it wants some and we have them."""
        known = (endpoint, repository)
        if authorization := self._authorizations.get(known):
            headers["Authorization"] = authorization
        async with contextlib.AsyncExitStack() as stack:
            answer = await self._follow(stack, endpoint, method, url, headers)
            if answer.status == 401 and endpoint.config.auth is not None:
                authorization = await self._authorization(endpoint, answer)
                if authorization:
                    self._authorizations[known] = headers["Authorization"] = authorization
                    await stack.aclose()
                    answer = await self._follow(stack, endpoint, method, url, headers)
            yield answer

    async def _follow(
        self,
        stack: contextlib.AsyncExitStack,
        endpoint: registries.Endpoint,
        method: str,
        url: URL,
        headers: "multidict.CIMultiDict[str]",
    ) -> aiohttp.ClientResponse:
        """Follow redirects within the endpoint's host, whose certificates containerd does not know."""
        context = await self._context(endpoint.config.tls)
        for _ in range(_MAX_REDIRECTS):
            answer = await stack.enter_async_context(
                self._session.request(method, url, headers=headers, ssl=context, allow_redirects=False)
            )
            location = answer.headers.get("Location", "")
            target = url.join(URL(location, encoded=True)) if location else url
            if answer.status not in {301, 302, 303, 307, 308} or target.origin() != url.origin():
                return answer
            url = target
        raise aiohttp.ClientPayloadError(f"{url} redirects in a circle")

    async def _context(self, tls: registries.Tls | None) -> ssl.SSLContext | bool:
        if tls is None:
            return True
        context = self._contexts.get(tls)
        if context is None:
            context = self._contexts[tls] = await asyncio.to_thread(_context, tls)
        return context

    async def _authorization(self, endpoint: registries.Endpoint, refusal: aiohttp.ClientResponse) -> str:
        """What opens an endpoint that asked for credentials; empty when we can't say."""
        auth = endpoint.config.auth
        assert auth is not None
        login = aiohttp.encode_basic_auth(*auth.login(), encoding="utf-8")
        for challenge in refusal.headers.getall("WWW-Authenticate", []):
            scheme, _, parameters = challenge.partition(" ")
            if scheme.lower() == "basic":
                return login
            if scheme.lower() == "bearer":
                named = {name.lower(): value for name, value in _CHALLENGE.findall(parameters)}
                token = await self._token(endpoint, auth, login, named)
                return f"Bearer {token}" if token else ""
        return ""

    async def _token(
        self,
        endpoint: registries.Endpoint,
        auth: registries.Auth,
        login: str,
        named: Mapping[str, str],
    ) -> str:
        """A token from whom the registry trusts for that (distribution: "Token Authentication Specification")."""
        realm = URL(named.get("realm", ""))
        if realm.scheme != "https" and not (realm.scheme == "http" and endpoint.url.startswith("http://")):
            _log.warning("the registry %s sends us to %s for a token, which is not encrypted", endpoint.url, realm)
            return ""
        asked = {key: named[key] for key in ("service", "scope") if key in named}
        context = await self._context(endpoint.config.tls)
        if auth.identity_token and not auth.username:
            form = {**asked, "grant_type": "refresh_token", "client_id": "nixlet", "refresh_token": auth.identity_token}
            call = self._session.post(realm, data=form, ssl=context, allow_redirects=False)
        else:
            call = self._session.get(
                realm, params=asked, headers={"Authorization": login}, ssl=context, allow_redirects=False
            )
        async with call as answer:
            if answer.status != 200:
                _log.warning("the registry %s gives no token: %s answers %d", endpoint.url, realm, answer.status)
                return ""
            return _token_of(await answer.content.read(_MAX_TOKEN))


async def _hand_on(
    request: web.Request, answer: aiohttp.ClientResponse, url: URL, dropped: AbstractSet[str]
) -> web.StreamResponse:
    handed_on = web.StreamResponse(status=answer.status, reason=answer.reason)
    for name, value in answer.headers.items():
        if name.lower() not in dropped:
            handed_on.headers.add(name, value)
    if location := answer.headers.get("Location"):
        handed_on.headers["Location"] = str(url.join(URL(location, encoded=True)))
    if length := answer.headers.get("Content-Length"):
        handed_on.headers["Content-Length"] = length
    await handed_on.prepare(request)
    if request.method != "HEAD":
        async for chunk in answer.content.iter_chunked(_CHUNK):
            await handed_on.write(chunk)
    await handed_on.write_eof()
    return handed_on


def _token_of(text: bytes) -> str:
    try:
        answer = msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError:
        return ""
    token = answer.get("token") or answer.get("access_token")
    return token if isinstance(token, str) and token.isascii() and token.isprintable() else ""


def _context(tls: registries.Tls) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if tls.ca_file:
        context.load_verify_locations(tls.ca_file)
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file or None)
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


@contextlib.asynccontextmanager
async def serve() -> AsyncIterator[RegistryRelay]:
    """A relay on a free port of the loopback address, for the time of the context."""
    async with contextlib.AsyncExitStack() as stack:
        sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        # Answers pass through as they are: containerd checks the digests of what the registry sent.
        session = await stack.enter_async_context(
            aiohttp.ClientSession(auto_decompress=False, timeout=_TIMEOUT, trust_env=True)
        )
        relay = RegistryRelay(session, f"http://127.0.0.1:{sock.getsockname()[1]}")
        application = web.Application()
        # HEAD is answered as well; all else is refused: nothing is pushed through here.
        application.router.add_get("/{key}/v2/{path:.*}", relay.answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.SockSite(runner, sock).start()
        yield relay
