"""Whose cluster's state is at a ``--datastore-endpoint``: a record in the datastore itself, looked at before there is an API server on it.

Two servers with authorities and keys of their own must not work on one state: each would let its own nodes in only, refuse the other's tokens, and be an
API server to the other's pods. So the first server writes down by which authority its cluster is known, and another one is refused. The same record
tells that an address leads to another database than before: a cluster would begin empty there, and its kubelets end all pods.

The record is a key that no API server looks at. It is made by a transaction which works only where there is none, the one form of it that kine
knows as well (etcd: api/etcdserverpb/rpc.proto; kine: pkg/server/create.go).
"""

import asyncio
import ssl
import urllib.parse

from nixlet import errors
from nixlet.cluster import settings as model
from nixlet.cluster import tokens
from nixlet.cluster.kubeconfigs import Credentials
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import files, words
from nixlet.kubeclient import trust
from nixlet.kubeclient.endpoint import Endpoint
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import etcd_grpc, etcd_pb2

_KEY = b"/nixlet/cluster"

#: Seconds for an answer. kine hands the question on to a database.
_ANSWER = 20.0


async def check(cluster: ClusterSettings, *, known: str) -> None:
    """Check that the state at a datastore-endpoint is this cluster's, or nobody's yet; then it is ours from now on.

    Args:
        cluster: The cluster, whose authorities are there.
        known: The file by which it is known that the state has had the record before; empty: it hasn't.

    Raises:
        FailedPreconditionError: The state is another cluster's, or there is none although this cluster had one.
        NixletError: The datastore can't be asked, or a file can't be read.
    """
    own = await asyncio.to_thread(_authority, cluster)
    found = await _asked(cluster, "" if known else own)
    if found == own:
        return
    if not found:
        raise errors.FailedPreconditionError(
            f"what --datastore-endpoint names has no state of the cluster in {cluster.data_dir}, which would begin empty there",
            hint="give the endpoint as before; an empty cluster is made in another --data-dir; and where this is a backup from before the state had a"
            f" record of whose it is, remove {known}",
        )
    raise errors.FailedPreconditionError(
        f"the state at --datastore-endpoint is another cluster's: its certificate authority has the hash {_shown(found)},"
        f" and the one in {cluster.layout.tls('')} {_shown(own)}",
        hint="a cluster has one server: name an empty database for this one; or where it takes the place of that server, bring its server/tls, server/cred"
        " and server/token back from a backup",
    )


def _authority(cluster: ClusterSettings) -> str:
    """By what a cluster is known, also in its tokens."""
    path = cluster.layout.tls("server-ca.crt")
    with files.refusing(f"{path} can't be read"), open(path, "rb") as file:
        return tokens.authority_hash(file.read())


def _shown(found: str) -> str:
    """The beginning of a hash; what stands there may be somebody else's words."""
    return f"{found[:12]}…" if found.isascii() and found.isalnum() else "that can't be read"


async def _asked(cluster: ClusterSettings, own: str) -> str:
    """What the record says; empty: there is none. Of several etcd servers the first that answers is asked.

    Args:
        cluster: The cluster.
        own: What it is to say where there is none; empty: none is made.
    """
    if not cluster.datastore_is_etcd:
        path = cluster.layout.kine_socket
        async with channels.connect(path) as channel:
            return await _record(channel, f"kine at {path}", own)
    failures: list[errors.NixletError] = []
    for host, port, tls in await asyncio.to_thread(_servers, cluster):
        try:
            async with channels.connect_to(host, port, tls) as channel:
                return await _record(channel, f"etcd at {host}:{port}", own)
        except (errors.UnavailableError, errors.DeadlineExceededError) as error:
            failures.append(error)
    raise failures[0]


def _servers(cluster: ClusterSettings) -> list[tuple[str, int, ssl.SSLContext | None]]:
    """The etcd servers, with what they are recognised by.

    Raises:
        NixletError: A file is none of what it should be.
    """
    found: list[tuple[str, int, ssl.SSLContext | None]] = []
    for url in cluster.datastore_endpoint.split(","):
        parts = urllib.parse.urlsplit(url)
        host, port, tls = parts.hostname or "", parts.port or model.ETCD_CLIENT_PORT, None
        if parts.scheme == "https":
            given = Credentials(cluster.datastore_certfile, cluster.datastore_keyfile)
            endpoint = Endpoint.of(url, what="etcd", authority=cluster.datastore_cafile, credentials=given)
            tls = trust.Trust(endpoint).context()
            tls.set_alpn_protocols(["h2"])
        found.append((host, port, tls))
    return found


async def _record(channel: channels.Channel, peer: str, own: str) -> str:
    stub = etcd_grpc.KVStub(channel)
    try:
        with channels.translated(peer):
            async with asyncio.timeout(_ANSWER):
                if own:
                    none = etcd_pb2.Compare(
                        key=_KEY, target=etcd_pb2.Compare.MOD, result=etcd_pb2.Compare.EQUAL, mod_revision=0
                    )
                    made = etcd_pb2.RequestOp(request_put=etcd_pb2.PutRequest(key=_KEY, value=own.encode()))
                    await stub.Txn(etcd_pb2.TxnRequest(compare=[none], success=[made]))
                found = (await stub.Range(etcd_pb2.RangeRequest(key=_KEY))).kvs
    except errors.NixletError as error:
        # (of a database kine hands on what that says)
        error.message = f"whose the state at --datastore-endpoint is isn't known: {words.shown(error.message)}"
        if isinstance(error, errors.PermissionDeniedError):
            error.hint = f"let us read and write the key {_KEY.decode()}, as well as those that begin with /registry/"
        raise
    return found[0].value.decode(errors="replace") if found else ""
