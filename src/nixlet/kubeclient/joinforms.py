"""What a node that joins says to a server, and what it is answered: JSON over HTTPS.

``GET /cacerts``: the certificates of the authority of servers, for everybody. A node compares their hash with that in its token; only then is
anything secret said. ``POST /v1/join`` with the token: a ``Wish``, which is answered by a ``Welcome``.
"""

import msgspec

from nixlet.cluster import settings

#: The paths.
AUTHORITY, JOIN = "/cacerts", "/v1/join"

#: How much further up than the API server's port a server lets nodes in.
PORT_ABOVE = settings.JOINING_ABOVE

#: How large each may be (bytes).
MAX_WISH, MAX_WELCOME, MAX_AUTHORITY = 64 << 10, 1 << 20, 256 << 10


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node that wants to be one of the cluster.

    Attributes:
        node: Its name.
        addresses: Its addresses.
        password: What it shows each time, so that nobody else can take its name. A secret.
        requests: Requests for certificates (PEM), by the names of ``cluster.joining``.
    """

    node: str
    addresses: tuple[str, ...]
    password: str
    requests: dict[str, str]

    def __repr__(self) -> str:
        return f"Wish({self.node!r})"


class ClusterFacts(msgspec.Struct, frozen=True):
    """What a node has to know of its cluster. Unknown fields are passed over: servers may be newer.

    Attributes:
        cluster_cidrs: The networks of pods.
        service_cidrs: The networks of services.
        cluster_dns: The DNS service's addresses.
        cluster_domain: The domain of services' names.
        flannel_backend: What routes pods' packets between nodes.
        https_listen_port: Where the API server listens.
    """

    cluster_cidrs: tuple[str, ...]
    service_cidrs: tuple[str, ...]
    cluster_dns: tuple[str, ...]
    cluster_domain: str
    flannel_backend: str
    https_listen_port: int


class Welcome(msgspec.Struct, frozen=True):
    """What a node gets.

    Attributes:
        facts: What it has to know.
        authorities: Certificates of authorities (PEM), by their files' names in ``agent/``.
        certificates: The node's certificates (PEM), by the names of the requests.
    """

    facts: ClusterFacts
    authorities: dict[str, str]
    certificates: dict[str, str]


class Refusal(msgspec.Struct, frozen=True):
    """Why a node isn't let in, in words."""

    message: str
    hint: str = ""
