"""Requests to registries, each by the way that is said of its endpoint: proxy, certificates, redirects."""

import asyncio
import contextlib
import ssl
from collections.abc import Mapping
from typing import Final

import aiohttp
import multidict
from yarl import URL

from nixlet.containerd import registries
from nixlet.host import proxies

#: Seconds to connect, and without a byte; a pull as a whole takes as long as it takes.
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)

#: As many as Go's programs follow.
_MAX_REDIRECTS: Final = 10
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})

Headers = multidict.CIMultiDict[str]


class Caller:
    """Asks registries."""

    def __init__(self, session: aiohttp.ClientSession, ways: proxies.Proxies) -> None:
        self._session = session
        self._proxies = ways
        self._contexts: dict[registries.Tls, ssl.SSLContext] = {}

    def forget_certificates(self) -> None:
        """Read certificates again: their files may have changed."""
        self._contexts.clear()

    async def ask(
        self,
        stack: contextlib.AsyncExitStack,
        endpoint: registries.Endpoint,
        method: str,
        url: URL,
        headers: Headers,
    ) -> aiohttp.ClientResponse:
        """An endpoint's answer, redirects followed; credentials stay with the endpoint's own host.

        All redirects are followed here: where they lead, the endpoint's certificates hold as well, and containerd knows none
        of them.

        Raises:
            aiohttp.ClientError, OSError, ValueError: There is none.
        """
        first = url.origin()
        for _ in range(_MAX_REDIRECTS):
            answer = await self._once(stack, endpoint, method, url, headers)
            location = answer.headers.get("Location", "")
            if answer.status not in _REDIRECTS or not location:
                return answer
            answer.release()
            url = url.join(URL(location, encoded=True))
            if url.scheme not in {"http", "https"}:
                raise aiohttp.ClientPayloadError(f"{endpoint.url} redirects to the scheme {url.scheme or 'of none'}")
            if url.origin() != first:
                headers = Headers(headers)
                headers.popall("Authorization", None)
        raise aiohttp.ClientPayloadError(f"{endpoint.url} redirects in a circle")

    async def ask_for_token(
        self,
        stack: contextlib.AsyncExitStack,
        endpoint: registries.Endpoint,
        realm: URL,
        headers: Headers,
        form: Mapping[str, str] | None,
    ) -> aiohttp.ClientResponse:
        """The answer of whom an endpoint trusts for tokens, to a form or to a plain question.

        Raises:
            aiohttp.ClientError, OSError, ValueError: There is none.
        """
        return await self._once(stack, endpoint, "GET" if form is None else "POST", realm, headers, form)

    async def _once(
        self,
        stack: contextlib.AsyncExitStack,
        endpoint: registries.Endpoint,
        method: str,
        url: URL,
        headers: Headers,
        form: Mapping[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        call = self._session.request(
            method,
            url,
            headers=headers,
            data=form,
            ssl=await self._context(endpoint.config.tls),
            proxy=self._proxy(url),
            allow_redirects=False,
        )
        return await stack.enter_async_context(call)

    def _proxy(self, url: URL) -> URL | None:
        said = self._proxies.for_url(str(url))
        if said is None:
            return None
        try:
            proxy = URL(said)
        except ValueError as error:
            # What was said may have a password in it.
            raise ValueError("the environment's proxy is no URL") from error
        if proxy.scheme not in {"http", "https"} or not proxy.host:
            raise ValueError(f"the environment's proxy is none for HTTP: its scheme is {proxy.scheme}")
        return proxy

    async def _context(self, tls: registries.Tls | None) -> ssl.SSLContext | bool:
        if tls is None:
            return True
        context = self._contexts.get(tls)
        if context is None:
            context = self._contexts[tls] = await asyncio.to_thread(_context, tls)
        return context


def _context(tls: registries.Tls) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if tls.ca_file:
        context.load_verify_locations(tls.ca_file)
    if tls.cert_file:
        # A key with a password would be asked for at the terminal.
        context.load_cert_chain(tls.cert_file, tls.key_file or None, password="")
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def session() -> aiohttp.ClientSession:
    """A session that adds nothing of its own: no cookies, no headers, no ``~/.netrc``; answers pass through as they are."""
    return aiohttp.ClientSession(
        auto_decompress=False,
        timeout=_TIMEOUT,
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
    )
