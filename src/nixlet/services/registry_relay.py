"""A relay between containerd and registries, for what containerd can't do: other repository names, changed credentials.

It speaks what a pull needs of the distribution project's HTTP API (distribution-spec) and its token authentication, on the loopback
address. It answers whoever sends the secret that goes with an endpoint, so that other users of this machine can't pull with the
node's credentials: containerd has it from files that only root can read, and sends it in a header, which no error repeats. The path
names the registry, for those who read containerd's errors.
"""

import contextlib
import dataclasses
import logging
import re
import secrets
import socket
from collections.abc import AsyncIterator, Collection
from typing import Final

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from nixlet.containerd import hosts, registries, rewrites
from nixlet.host import proxies
from nixlet.services import registry_calls, registry_login

#: Bytes that are handed on at a time.
_CHUNK: Final = 256 << 10

#: The header with an endpoint's secret.
HEADER: Final = "Nixlet-Endpoint"

#: A path below an endpoint (distribution-spec, "Endpoints").
_PATH: Final = re.compile(
    r"/(?P<repository>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?P<rest>/(?:manifests|blobs|referrers)/[A-Za-z0-9_+.=:-]+|/tags/list)"
)

#: Of HTTP between two neighbours (RFC 9110, 7.6.1), or set anew by each.
_NOT_HANDED_ON: Final = frozenset(
    {
        "connection",
        "host",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        HEADER.lower(),
    }
)

#: Endpoints of before that are still served, for pulls that run.
_MAX_FORMER: Final = 256

#: Bytes of a form with credentials, and of a header: the longest tokens of clouds have a few thousand.
_MAX_FORM: Final = 32 << 10
_MAX_HEADER: Final = 64 << 10

#: Seconds that those who ask still have when the relay ends.
_SHUTDOWN: Final = 1.0

#: What is said in a status line is short; containerd has it in its errors.
_MAX_REASON: Final = 300

_Name = tuple[str, tuple[rewrites.Rewrite, ...]]

_log = logging.getLogger("nixlet.registries")


class RegistryRelay:
    """Asks endpoints on behalf of containerd."""

    def __init__(self, caller: registry_calls.Caller, base: str, source: str) -> None:
        """A relay.

        Args:
            caller: Asks registries.
            base: The URL at which it listens.
            source: Where people say how registries are reached, for errors.
        """
        self._caller = caller
        self._base = base
        self._source = source
        self._keys = registry_login.Keys(caller)
        self._secrets: dict[_Name, str] = {}
        self._endpoints: dict[str, registries.Endpoint] = {}

    def way_to(self, endpoint: registries.Endpoint) -> hosts.Way:
        """How containerd gets to an endpoint."""
        secret = self._secrets.get(_name(endpoint))
        if secret is None:
            secret = self._secrets[_name(endpoint)] = secrets.token_urlsafe(24)
            self._endpoints[secret] = endpoint
        return hosts.Way(f"{self._base}{_prefix(endpoint)}", {HEADER: secret})

    def forget_others(self, endpoints: Collection[registries.Endpoint]) -> None:
        """Serve these endpoints, with what is said of their hosts now, and no others.

        A pull that runs goes on by the way that it was told when it began: where repositories were called otherwise at the same
        place, they are served by those names as well, for a while.
        """
        configs = {endpoint.url: endpoint.config for endpoint in endpoints}
        wanted = {_name(endpoint) for endpoint in endpoints}
        former = [name for name in self._secrets if name not in wanted]
        gone = {name for name in former if name[0] not in configs} | set(former[:-_MAX_FORMER])
        for name in gone:
            del self._endpoints[self._secrets.pop(name)]
        for secret, endpoint in self._endpoints.items():
            self._endpoints[secret] = dataclasses.replace(endpoint, config=configs[endpoint.url])
        self._keys.forget_others(set(self._endpoints.values()))

    async def give_token(self, request: web.Request) -> web.Response:
        """Give containerd a token for the credentials that it has, or for none."""
        try:
            form = await request.post() if request.method == "POST" else {}
        except (ValueError, LookupError):
            return web.Response(status=400, text="this is no form\n")
        auth = registry_login.shown(request.headers.get("Authorization", ""), form)
        token = registry_login.token_for(auth)
        return web.json_response({"token": token, "access_token": token, "expires_in": 3600})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer containerd."""
        endpoint = self._endpoints.get(request.headers.get(HEADER, ""))
        path = request.rel_url.raw_path
        if endpoint is None or not path.startswith(_prefix(endpoint)):
            return web.Response(status=404, text="there is no such endpoint\n")
        path = path.removeprefix(_prefix(endpoint))
        found = _PATH.fullmatch(path)
        if found is None and path not in {"", "/"}:
            return web.Response(status=404, text="no pull asks for this\n")
        repository = found["repository"] if found else ""
        for rewrite in endpoint.rewrites:
            if (changed := rewrite.apply(repository)) != repository:
                repository = changed
                break
        path = f"/{repository}{found['rest']}" if found else "/"
        handed_on = web.StreamResponse()
        try:
            # encoded: what the registry is asked is what containerd wrote, byte for byte.
            query = request.rel_url.raw_query_string
            url = URL(f"{endpoint.url}{path}{'?' if query else ''}{query}", encoded=True)
            async with contextlib.AsyncExitStack() as stack:
                answer = await self._ask(stack, request, endpoint, url, repository)
                if answer.status == 401 and answer.url.origin() == url.origin():
                    return self._refusal(request, endpoint)
                await _hand_on(request, answer, handed_on)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            if request.transport is None or request.transport.is_closing():
                # It is containerd that is gone.
                return handed_on
            said = f"{endpoint.url} could not be asked: {str(error) or type(error).__name__}"
            _log.warning("the registry %s", said)
            if not handed_on.prepared:
                return _error(502, "UNAVAILABLE", said)
            # What was sent already looks like the beginning of the whole: it must not come to a good end.
            request.transport.abort()
        return handed_on

    async def _ask(
        self,
        stack: contextlib.AsyncExitStack,
        request: web.Request,
        endpoint: registries.Endpoint,
        url: URL,
        repository: str,
    ) -> aiohttp.ClientResponse:
        """An endpoint's answer to what containerd asks; with credentials once containerd has told whose they are to be."""
        headers = registry_calls.Headers(
            (name, value) for name, value in request.headers.items() if name.lower() not in _NOT_HANDED_ON
        )
        authorization = headers.get("Authorization", "")
        if not registry_login.is_ours(authorization):
            return await self._caller.ask(stack, endpoint, request.method, url, headers)
        auth = registry_login.login_of(authorization) or endpoint.config.auth
        del headers["Authorization"]
        if known := self._keys.known(endpoint, auth, repository):
            headers["Authorization"] = known
        answer = await self._caller.ask(stack, endpoint, request.method, url, headers)
        if answer.status == 401 and answer.url.origin() == url.origin():
            key = await self._keys.asked_for(endpoint, auth, repository, answer)
            if key and key != known:
                answer.release()
                headers["Authorization"] = key
                answer = await self._caller.ask(stack, endpoint, request.method, url, headers)
        return answer

    def _refusal(self, request: web.Request, endpoint: registries.Endpoint) -> web.Response:
        """The registry wants credentials: containerd is asked for them; if it was already, those were the wrong ones."""
        authorization = request.headers.get("Authorization", "")
        if not registry_login.is_ours(authorization):
            challenge = f'Bearer realm="{self._base}/token",service="{endpoint.host}"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        if registry_login.login_of(authorization) is not None:
            said = f"{endpoint.host} refuses the credentials that came with the pull"
        elif endpoint.config.auth is not None:
            said = f"{endpoint.host} refuses the credentials that {self._source} has for it"
        else:
            said = f"{endpoint.host} wants credentials, and {self._source} has none for it"
        _log.warning("the registry %s", said)
        return _error(401, "UNAUTHORIZED", said)


def _name(endpoint: registries.Endpoint) -> "_Name":
    """What an endpoint is known by, whatever is said of its host."""
    return endpoint.url, endpoint.rewrites


def _prefix(endpoint: registries.Endpoint) -> str:
    """The path that stands for an endpoint's URL. Without the brackets of IPv6: containerd 1 can't read them in a key."""
    return "/" + endpoint.url.replace("://", "/", 1).replace("[", "").replace("]", "")


def _error(status: int, code: str, message: str) -> web.Response:
    """An error of ours: in the status line, which containerd has in its own error, and as distribution-spec has it."""
    reason = "".join(each if " " <= each <= "~" else "?" for each in message)[:_MAX_REASON]
    body = msgspec.json.encode({"errors": [{"code": code, "message": message}]})
    return web.Response(status=status, reason=reason, body=body, content_type="application/json")


async def _hand_on(request: web.Request, answer: aiohttp.ClientResponse, handed_on: web.StreamResponse) -> None:
    handed_on.set_status(answer.status, answer.reason)
    for name, value in answer.headers.items():
        if name.lower() not in _NOT_HANDED_ON:
            handed_on.headers.add(name, value)
    if length := answer.headers.get("Content-Length"):
        handed_on.headers["Content-Length"] = length
    await handed_on.prepare(request)
    if request.method != "HEAD":
        async for chunk in answer.content.iter_chunked(_CHUNK):
            await handed_on.write(chunk)
    await handed_on.write_eof()


@contextlib.asynccontextmanager
async def serve(source: str, ways: proxies.Proxies) -> AsyncIterator[RegistryRelay]:
    """A relay on a free port of the loopback address, for the time of the context.

    Args:
        source: Where people say how registries are reached, for errors.
        ways: The proxies by which registries are asked.
    """
    async with contextlib.AsyncExitStack() as stack:
        sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        session = await stack.enter_async_context(registry_calls.session())
        caller = registry_calls.Caller(session, ways)
        relay = RegistryRelay(caller, f"http://127.0.0.1:{sock.getsockname()[1]}", source)
        application = web.Application(client_max_size=_MAX_FORM)
        # HEAD is answered as well; all else is refused: nothing is pushed through here.
        application.router.add_get("/token", relay.give_token)
        application.router.add_post("/token", relay.give_token)
        application.router.add_get("/{path:.*}", relay.answer)
        runner = web.AppRunner(
            application,
            access_log=None,
            shutdown_timeout=_SHUTDOWN,
            max_field_size=_MAX_HEADER,
            max_line_size=_MAX_HEADER,
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.SockSite(runner, sock).start()
        yield relay
