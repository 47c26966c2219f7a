"""Kubeconfig files: written for the cluster's own programs and for people, and read where somebody hands one over."""

import binascii
import dataclasses
import grp
import os
import re
import stat
import urllib.parse
from collections.abc import Mapping
from typing import Literal

from nixlet import errors
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import ClusterSettings
from nixlet.encoding import yamlread, yamlwrite
from nixlet.host import files

#: What the parts of a file are called in those for people, as k3s has it.
DEFAULT_NAME = "default"

_MODE = re.compile(r"(?:0o?)?([0-7]{3})")

#: Groups have numbers of 32 bits, of which the last means none.
_MAX_GROUP = (1 << 32) - 2

#: What of a user and of a cluster changes whom one speaks to, and as whom: passed over, a request would say something else than the file.
_NOT_OF_USERS = (
    "exec", "auth-provider", "username", "password", "as", "as-uid", "as-groups", "as-user-extra",
)  # fmt: skip
_NOT_OF_CLUSTERS = ("proxy-url", "tls-server-name")

#: Tokens are no longer than what a server takes as a header (bytes).
_MAX_TOKEN = 64 << 10


@dataclasses.dataclass(frozen=True, slots=True)
class Credentials:
    """Whom a client is to the API server: by a certificate, in files or as data, or by a token.

    Attributes:
        certificate: The path of the certificate.
        key: The path of its key.
        certificate_data: The certificate itself, in place of a path.
        key_data: The key itself, in place of a path. A secret.
        token: A bearer token. A secret.
    """

    certificate: str = ""
    key: str = ""
    certificate_data: bytes = b""
    key_data: bytes = dataclasses.field(default=b"", repr=False)
    token: str = dataclasses.field(default="", repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Kubeconfig:
    """A cluster, and who one is there.

    Attributes:
        server: The API server's URL.
        authority: The path of the certificates of its authority.
        authority_data: These themselves, in place of a path.
        credentials: Who one is.
        cluster: What the cluster is called in the file.
        user: What the user is called in the file.
        context: What both together are called.
    """

    server: str
    authority: str = ""
    authority_data: bytes = b""
    credentials: Credentials = Credentials()
    cluster: str = DEFAULT_NAME
    user: str = DEFAULT_NAME
    context: str = DEFAULT_NAME

    def rendered(self) -> str:
        """The file's text. It may hold secrets."""
        credentials = self.credentials
        cluster = {
            **_path_or_data("certificate-authority", self.authority, self.authority_data),
            "server": self.server,
        }
        user = {
            **_path_or_data("client-certificate", credentials.certificate, credentials.certificate_data),
            **_path_or_data("client-key", credentials.key, credentials.key_data),
            **({"token": credentials.token} if credentials.token else {}),
        }
        return yamlwrite.document(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": self.cluster, "cluster": cluster}],
                "users": [{"name": self.user, "user": user}],
                "contexts": [{"name": self.context, "context": {"cluster": self.cluster, "user": self.user}}],
                "current-context": self.context,
            }
        )


def _path_or_data(key: str, path: str, data: bytes) -> dict[str, str]:
    if data:
        return {f"{key}-data": binascii.b2a_base64(data, newline=False).decode()}
    return {key: path} if path else {}


def of_server(settings: ClusterSettings) -> dict[str, Kubeconfig]:
    """The files by which a server's own programs reach the API server: what each says, by its path."""
    places = settings.layout
    return {
        places.cred(f"{name}.kubeconfig"): _known_as(
            settings.server_url, places.tls("server-ca.crt"), places.tls(f"client-{name}")
        )
        for name in ("admin", "controller", "scheduler")
    }


def administrator(settings: ClusterSettings) -> Kubeconfig:
    """How a server asks its API server as its administrator."""
    return of_server(settings)[settings.layout.cred("admin.kubeconfig")]


def of_node(places: Layout, server: str) -> dict[str, Kubeconfig]:
    """The files by which the programs of a node reach the API server at a URL: what each says, by its path."""
    return {
        places.node(f"{name}.kubeconfig"): _known_as(
            server, places.node("server-ca.crt"), places.node(f"client-{client}")
        )
        for name, client in (("kubelet", "kubelet"), ("kubeproxy", "kube-proxy"))
    }


def _known_as(server: str, authority: str, client: str) -> Kubeconfig:
    return Kubeconfig(server, authority, credentials=Credentials(f"{client}.crt", f"{client}.key"))


def for_people(settings: ClusterSettings) -> Kubeconfig:
    """The administrator's file, whole in itself: it can be taken to another machine.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``.
    """
    places = settings.layout
    authority, certificate, key = (
        _content(places.tls(name)) for name in ("server-ca.crt", "client-admin.crt", "client-admin.key")
    )
    credentials = Credentials(certificate_data=certificate, key_data=key)
    return Kubeconfig(settings.server_url, authority_data=authority, credentials=credentials)


def _content(path: str) -> bytes:
    with files.refusing(f"{path} can't be read"), open(path, "rb") as file:
        return file.read()


def mode(text: str) -> int:
    """A file's mode as ``--write-kubeconfig-mode`` has it: three octal digits, also with 0 or 0o before them.

    Raises:
        InvalidArgumentError: It is something else, or lets everybody write, or keeps the owner from reading.
    """
    match = _MODE.fullmatch(text)
    found = int(match[1], 8) if match else 0
    if match is None:
        raise errors.InvalidArgumentError(f"write-kubeconfig-mode {text!r} is no mode", hint="such as 600 or 640")
    if found & 0o002 or not found & 0o400:
        problem = "lets everybody write" if found & 0o002 else "lets its owner not read"
        raise errors.InvalidArgumentError(f"write-kubeconfig-mode {text} {problem}", hint="such as 600 or 640")
    return found


def group(text: str) -> int:
    """The number of a group as ``--write-kubeconfig-group`` names it; -1 for none.

    Raises:
        InvalidArgumentError: No group has that number.
        NotFoundError: There is no such group.
    """
    if not text:
        return -1
    if text.isascii() and text.isdigit():
        # (thousands of digits are no number to Python)
        if len(text) > len(str(_MAX_GROUP)) or int(text) > _MAX_GROUP:
            raise errors.InvalidArgumentError(f"write-kubeconfig-group {text[:20]} is no group's number")
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError as error:
        raise errors.NotFoundError(f"write-kubeconfig-group: this machine has no group {text!r}") from error


def write(path: str, config: Kubeconfig, *, mode: int = 0o600, group: int = -1) -> None:
    """Write a file, whole, with this mode whatever the umask is; its directory is made.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``.
    """
    files.make_directory(os.path.dirname(path))
    files.write_atomically(path, config.rendered(), mode=mode, group=group)


def read(path: str, context: str = "") -> Kubeconfig:
    """What a file says of a cluster and of who one is there.

    Args:
        path: The file. Paths in it are taken from its directory.
        context: Which of its contexts; empty: the current one, or the only one.

    Raises:
        UsageError: It is no kubeconfig file, or lacks what is asked for.
        UnsupportedError: Its user is known by other means than a certificate or a token or speaks as somebody else, or its server isn't to be
            verified or is reached by a proxy.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    with files.refusing(f"the kubeconfig {path} can't be read"), open(path, "rb") as file:
        text = file.read(yamlread.MAX_BYTES + 1)
    documents = list(yamlread.documents(text, path))
    if len(documents) != 1:
        raise errors.UsageError(f"{path} is no kubeconfig file: it has {len(documents)} documents")
    document = documents[0]
    if document.text("kind", "Config") != "Config":
        raise document.error("kind", "is not Config: this is no kubeconfig file")
    contexts, clusters, users = (_named(document, kind) for kind in ("contexts", "clusters", "users"))
    name = context or document.text("current-context")
    if not name and len(contexts) == 1:
        name = next(iter(contexts))
    if not name:
        raise errors.UsageError(f"{path} has no current-context", hint="it should say which of its clusters is meant")
    chosen = _inner(contexts, name, "context", path)
    cluster_name, user_name = chosen.required_text("cluster"), chosen.text("user")
    cluster = _inner(clusters, cluster_name, "cluster", path)
    directory = os.path.dirname(os.path.abspath(path))
    credentials = Credentials()
    if user_name:
        credentials = _credentials(_inner(users, user_name, "user", path), user_name, directory, path)
    server = _server(cluster)
    for key in _NOT_OF_CLUSTERS:
        if cluster.kind(key) != "nothing":
            raise errors.UnsupportedError(
                f"cluster {yamlread.shown(cluster_name)} in {path} has {key}, which is not supported"
            )
    if cluster.boolean("insecure-skip-tls-verify"):
        raise errors.UnsupportedError(
            f"{path} says not to verify the server, and then it may be anybody", hint="name its certificate-authority"
        )
    authority, authority_data = _either(cluster, "certificate-authority", directory)
    return Kubeconfig(server, authority, authority_data, credentials, cluster_name, user_name, name)


def _named(document: yamlread.Mapping, kind: str) -> dict[str, yamlread.Mapping]:
    found: dict[str, yamlread.Mapping] = {}
    for each in document.mappings(kind):
        name = each.required_text("name")
        if name in found:
            raise each.error("name", f"is there twice among {kind}: {yamlread.shown(name)}")
        found[name] = each
    return found


def _server(cluster: yamlread.Mapping) -> str:
    server = cluster.required_text("server")
    if not server.startswith("https://"):
        raise cluster.error("server", "must begin with https://")
    try:
        url = urllib.parse.urlsplit(server)
        # (the port is looked at when it is asked for)
        good = bool(url.hostname) and "@" not in url.netloc and url.port != 0 and not (url.query or url.fragment)
    except ValueError:
        good = False
    if not good or not server.isascii() or not server.isprintable() or " " in server:
        # (without its cause, which tells what may be a password)
        raise cluster.error("server", "must be a URL with a host and no user") from None
    return server


def _inner(
    found: Mapping[str, yamlread.Mapping], name: str, kind: Literal["context", "cluster", "user"], path: str
) -> yamlread.Mapping:
    if name not in found:
        raise errors.UsageError(f"{path} has no {kind} {yamlread.shown(name)}")
    inner = found[name].mapping(kind)
    if inner is None:
        raise found[name].missing(kind)
    return inner


def _credentials(user: yamlread.Mapping, name: str, directory: str, path: str) -> Credentials:
    for key in _NOT_OF_USERS:
        if user.kind(key) != "nothing":
            raise errors.UnsupportedError(
                f"user {yamlread.shown(name)} in {path} is known by {key}, which is not supported",
                hint="a client certificate or a token is",
            )
    certificate, certificate_data = _either(user, "client-certificate", directory)
    key, key_data = _either(user, "client-key", directory)
    token = user.text("token")
    token_file = user.text("tokenFile")
    if token and not _is_token(token):
        raise user.error("token", "is no token: it has blanks or other characters than ASCII's")
    if token_file:
        token = _token_in(os.path.join(directory, token_file), token)
    if (certificate or certificate_data) and not (key or key_data):
        raise user.error("client-certificate", "has no client-key beside it")
    return Credentials(certificate, key, certificate_data, key_data, token)


def _is_token(text: str) -> bool:
    """Whether a text goes into a header as it is, and nothing else with it."""
    return text.isascii() and text.isprintable() and " " not in text


def _token_in(path: str, otherwise: str) -> str:
    """The token in a file; as client-go has it, it comes before one that stands in the kubeconfig, which is for a file that can't be read."""
    try:
        # A pipe would keep us waiting.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise errors.UsageError(f"the token's file {path} is no regular file")
            data = file.read(_MAX_TOKEN + 1).strip()
    except OSError as error:
        if otherwise:
            return otherwise
        raise files.refused(f"the token's file {path} can't be read", error) from error
    token = data.decode("ascii", "replace")
    if not token or len(data) > _MAX_TOKEN or not _is_token(token):
        raise errors.UsageError(f"the token's file {path} holds no token: one word of ASCII's characters")
    return token


def _either(mapping: yamlread.Mapping, key: str, directory: str) -> tuple[str, bytes]:
    """A path or the data in its place; data comes first, as kubectl has it."""
    path, data = mapping.text(key), mapping.text(f"{key}-data")
    if data:
        try:
            # Lines may be broken, as Go's decoder has it.
            return "", binascii.a2b_base64(data.replace("\r", "").replace("\n", ""), strict_mode=True)
        except ValueError:
            # (without its cause, which is about what may be a key)
            raise mapping.error(f"{key}-data", "is no base64") from None
    return os.path.join(directory, path) if path else "", b""
