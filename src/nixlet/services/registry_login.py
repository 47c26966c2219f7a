"""Whose credentials a registry is shown: those that came with a pull, else those of registries.yaml, else none.

containerd shows credentials only to who asks for them, and keeps to itself whether it has any. So the relay asks it, by a challenge
of its own whose realm is the relay itself (distribution: "Token Authentication Specification"): containerd comes there with the
credentials of the pull, or without any. The token that it gets is these very credentials, as the relay alone reads them: nothing is
remembered for it, so that nobody who asks for tokens takes room or makes another's be forgotten.
"""

import base64
import binascii
import contextlib
import logging
import re
from collections.abc import Mapping
from typing import Final

import aiohttp
import msgspec
from yarl import URL

from nixlet.containerd import registries
from nixlet.encoding import unreadable
from nixlet.services import registry_calls

#: The most that the answer with a token may have (bytes).
_MAX_TOKEN: Final = 1 << 20

#: Opened repositories that are remembered; all are asked for again beyond that.
_MAX_REMEMBERED: Final = 1024

#: What the relay's own tokens begin with.
_OURS: Final = "nixlet."

#: What whom a registry trusts for tokens answers when it refuses credentials (RFC 6749, 5.2; RFC 9110).
_REFUSALS: Final = frozenset({400, 401, 403})

_CHALLENGE: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

_log = logging.getLogger("nixlet.registries")


def token_for(auth: registries.Auth | None) -> str:
    """A token of the relay's for a login; None for a pull that has none."""
    return _OURS + (base64.urlsafe_b64encode(msgspec.json.encode(auth)).decode() if auth is not None else "")


def is_ours(authorization: str) -> bool:
    """Whether a header has a token of the relay's."""
    return _bearer(authorization).startswith(_OURS)


def login_of(authorization: str) -> registries.Auth | None:
    """The login in a header with a token of the relay's; None for a pull that has none."""
    said = _bearer(authorization).removeprefix(_OURS)
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(said), type=registries.Auth) if said else None
    except (binascii.Error, UnicodeError, *unreadable.JSON):
        return None


def _bearer(authorization: str) -> str:
    scheme, _, token = authorization.partition(" ")
    return token if scheme.lower() == "bearer" else ""


def shown(authorization: str, form: Mapping[str, object]) -> registries.Auth | None:
    """The login in a request for a token: a header, or the fields of OAuth 2 (RFC 6749, 4.3.2 and 6)."""
    scheme, _, said = authorization.partition(" ")
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            name, _, password = base64.b64decode(said, validate=True).decode().partition(":")
            return registries.Auth(name, password)
    fields = {name: value for name, value in form.items() if isinstance(value, str)}
    if token := fields.get("refresh_token"):
        return registries.Auth(identity_token=token)
    name = fields.get("username", "")
    return registries.Auth(name, fields.get("password", "")) if name else None


class Keys:
    """What opens registries: an Authorization header for each login and repository."""

    def __init__(self, caller: registry_calls.Caller) -> None:
        self._caller = caller
        self._known: dict[tuple[registries.Endpoint, registries.Auth | None, str], str] = {}

    def forget_others(self, endpoints: set[registries.Endpoint]) -> None:
        """Remember what opens these endpoints, and no other."""
        self._known = {key: value for key, value in self._known.items() if key[0] in endpoints}

    def known(self, endpoint: registries.Endpoint, auth: registries.Auth | None, repository: str) -> str:
        """What opened a repository before; empty when nothing is known."""
        return self._known.get((endpoint, auth, repository), "")

    async def asked_for(
        self,
        endpoint: registries.Endpoint,
        auth: registries.Auth | None,
        repository: str,
        refusal: aiohttp.ClientResponse,
    ) -> str:
        """What opens an endpoint that refused to answer; empty when nothing that we have does.

        Raises:
            aiohttp.ClientError, OSError, ValueError: Whom it trusts for tokens could not be asked, or gives none.
        """
        found = await self._found(endpoint, auth, refusal)
        if found:
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            self._known[endpoint, auth, repository] = found
        return found

    async def _found(
        self, endpoint: registries.Endpoint, auth: registries.Auth | None, refusal: aiohttp.ClientResponse
    ) -> str:
        login = _basic(*auth.login()) if auth is not None else ""
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
        self, endpoint: registries.Endpoint, auth: registries.Auth | None, login: str, named: Mapping[str, str]
    ) -> str:
        """A token from whom the registry trusts for that; with no login, one that everybody gets."""
        realm = URL(named.get("realm", ""))
        secret = auth is not None and bool(login or auth.identity_token)
        if realm.scheme != "https" and not (
            realm.scheme == "http" and (not secret or endpoint.url.startswith("http://"))
        ):
            raise aiohttp.ClientPayloadError(
                f"it sends us to {_place(realm)} for a token, which is not encrypted, and there are credentials to show"
                if realm.scheme == "http"
                else "what it says of who gives tokens makes no sense"
            )
        asked = {key: named[key] for key in ("service", "scope") if key in named}
        headers, form = registry_calls.Headers(), None
        if auth is not None and auth.identity_token and not login:
            form = {**asked, "grant_type": "refresh_token", "client_id": "nixlet", "refresh_token": auth.identity_token}
        else:
            realm = realm.update_query(asked)
            if login:
                headers["Authorization"] = login
        async with contextlib.AsyncExitStack() as stack:
            answer = await self._caller.ask_for_token(stack, endpoint, realm, headers, form)
            if answer.status in _REFUSALS:
                _log.warning("the registry %s: %s answers %d", endpoint.url, _place(realm), answer.status)
                return ""
            if answer.status != 200:
                raise aiohttp.ClientPayloadError(
                    f"it gives no token: {_place(answer.url)} answers {answer.status} {answer.reason or ''}".rstrip()
                )
            text = b""
            async for chunk in answer.content.iter_chunked(_MAX_TOKEN):
                text += chunk
                if len(text) > _MAX_TOKEN:
                    break
            token = _token_of(text)
            if not token:
                raise aiohttp.ClientPayloadError(f"it gives no token: {_place(answer.url)} answers something else")
            return token


def _basic(name: str, password: str) -> str:
    """A header of HTTP's Basic scheme (RFC 7617); empty where nobody is named."""
    return f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}" if name else ""


def _place(url: URL) -> str:
    """A URL for a sentence: without what may be secret in it."""
    return str(url.with_query(None).with_fragment(None).with_user(None))


def _token_of(text: bytes) -> str:
    try:
        answer = msgspec.json.decode(text, type=dict[str, object])
    except unreadable.JSON:
        return ""
    token = answer.get("token") or answer.get("access_token")
    return token if isinstance(token, str) and token.isascii() and token.isprintable() else ""
