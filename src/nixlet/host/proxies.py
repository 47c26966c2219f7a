"""Which proxy an HTTP request goes by, from the variables of an environment, by the rules of Go's programs.

The rules are those of golang.org/x/net/http/httpproxy, so that what we ask takes the way that containerd's own requests take.
"""

import dataclasses
import ipaddress
from collections.abc import Iterator, Mapping
from urllib import parse

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PORTS = {"http": 80, "https": 443}


@dataclasses.dataclass(frozen=True, slots=True)
class _Exception:
    """An entry of NO_PROXY: a network or a domain, with a port or without."""

    network: Network | None
    domain: str = ""
    itself: bool = True
    port: str = ""

    def holds_for(self, host: str, address: Address | None, port: int) -> bool:
        if self.port and self.port != str(port):
            return False
        if self.network is not None:
            return address is not None and address.version == self.network.version and address in self.network
        return address is None and (host.endswith(f".{self.domain}") or (self.itself and host == self.domain))


@dataclasses.dataclass(frozen=True, slots=True)
class Proxies:
    """What HTTP_PROXY, HTTPS_PROXY and NO_PROXY say.

    Attributes:
        by_scheme: The proxy's URL for each scheme that has one.
        exceptions: The entries of NO_PROXY.
        none_at_all: NO_PROXY is ``*``.
    """

    by_scheme: Mapping[str, str] = dataclasses.field(default_factory=dict)
    exceptions: tuple[_Exception, ...] = ()
    none_at_all: bool = False

    def for_url(self, url: str) -> str | None:
        """The proxy by which a URL is asked; None: directly, as this machine itself always is."""
        parts = parse.urlsplit(url)
        proxy = self.by_scheme.get(parts.scheme)
        host = (parts.hostname or "").rstrip(".")
        if not proxy or not host or host == "localhost" or self.none_at_all:
            return None
        address = _address(host)
        if address is not None and address.is_loopback:
            return None
        port = parts.port or _PORTS[parts.scheme]
        return None if any(each.holds_for(host, address, port) for each in self.exceptions) else proxy


def from_environment(environment: Mapping[str, str]) -> Proxies:
    """The proxies that an environment names; names in capitals win."""

    def said(name: str) -> str:
        return environment.get(name) or environment.get(name.lower()) or ""

    by_scheme = {scheme: _proxy(said(f"{scheme.upper()}_PROXY")) for scheme in _PORTS}
    entries = [entry.strip().lower() for entry in said("NO_PROXY").split(",")]
    exceptions = tuple(each for entry in entries if entry for each in _exceptions(entry))
    return Proxies({scheme: url for scheme, url in by_scheme.items() if url}, exceptions, none_at_all="*" in entries)


def _proxy(said: str) -> str:
    """A proxy's URL; a host alone is one of HTTP."""
    return said if not said or "://" in said else f"http://{said}"


def _exceptions(entry: str) -> Iterator[_Exception]:
    """What an entry means: a network, an address or a domain; nothing where it has no host."""
    try:
        yield _Exception(ipaddress.ip_network(entry, strict=False))
        return
    except ValueError:
        host, port = _split(entry)
    if (address := _address(host)) is not None:
        yield _Exception(ipaddress.ip_network(address), port=port)
        return
    itself = not host.startswith((".", "*."))
    if domain := host.removeprefix("*").removeprefix("."):
        yield _Exception(None, domain, itself, port)


def _split(entry: str) -> tuple[str, str]:
    if entry.startswith("["):
        host, _, rest = entry[1:].partition("]")
        return host, rest.removeprefix(":")
    if entry.count(":") == 1:
        host, _, port = entry.partition(":")
        return host, port
    return entry, ""


def _address(host: str) -> Address | None:
    """A host that is an address; one of IPv4 in IPv6's form is that of IPv4."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
