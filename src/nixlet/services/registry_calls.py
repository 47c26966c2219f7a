"""Requests to registries, each by the way that is said of its endpoint: proxy, certificates, redirects."""

import asyncio
import contextlib
import os
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

_Files = tuple[tuple[int, ...], ...]


class Caller:
    """Asks registries."""

    def __init__(self, session: aiohttp.ClientSession, ways: proxies.Proxies) -> None:
        self._session = session
        self._proxies = ways
        #: With what its files were when they were read.
        self._contexts: dict[registries.Tls, tuple[_Files, ssl.SSLContext]] = {}

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

        Redirects are followed as in ``ask``, but for a form: that is itself the secret.

        Raises:
            aiohttp.ClientError, OSError, ValueError: There is none.
        """
        if form is None:
            return await self.ask(stack, endpoint, "GET", realm, headers)
        return await self._once(stack, endpoint, "POST", realm, headers, form)

    async def _once(
        self,
        stack: contextlib.AsyncExitStack,
        endpoint: registries.Endpoint,
        method: str,
        url: URL,
        headers: Headers,
        form: Mapping[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        proxy = self._proxy(url)
        # What proves us to the proxy is no part of its URL: errors have that. It stands in the request that the proxy reads.
        proof = _proof(proxy)
        by = proxy.with_user(None) if proxy is not None else None
        tunnel = url.scheme == "https"
        if not tunnel:
            headers = Headers(headers)
            headers.update(proof)
        call = self._session.request(
            method,
            url,
            headers=headers,
            data=form,
            ssl=await self._context(endpoint.config.tls),
            proxy=by,
            proxy_headers=proof if tunnel and proof else None,
            allow_redirects=False,
        )
        try:
            return await stack.enter_async_context(call)
        except aiohttp.ClientHttpProxyError as error:
            raise aiohttp.ClientConnectionError(
                f"the proxy {by.authority if by is not None else ''} answers {error.status} {error.message}"
            ) from error
        except (aiohttp.ClientResponseError, aiohttp.InvalidURL) as error:
            # Both have the whole URL in their words, and what is in its query may open a store.
            what = error.message if isinstance(error, aiohttp.ClientResponseError) else "there can be no such host"
            raise aiohttp.ClientPayloadError(f"{url.scheme}://{url.host}: {what.strip()}") from error

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
        files, context = self._contexts.get(tls, (None, None))
        if context is None or files != _files(tls):
            # Looked at before they are read: what changes meanwhile is read again.
            files = _files(tls)
            context = await asyncio.to_thread(_context, tls)
            self._contexts[tls] = files, context
        return context


def _proof(proxy: URL | None) -> Mapping[str, str]:
    """What proves us to a proxy whose URL has a user's name."""
    if proxy is None or proxy.user is None:
        return {}
    return {"Proxy-Authorization": aiohttp.encode_basic_auth(proxy.user, proxy.password or "", encoding="utf-8")}


def _files(tls: registries.Tls) -> "_Files":
    """What tells certificates and keys from those that have the same names later."""
    found = []
    for path in filter(None, (tls.ca_file, tls.cert_file, tls.key_file)):
        status = os.stat(path)
        found.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


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
