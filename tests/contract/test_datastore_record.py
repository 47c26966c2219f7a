"""Whose a datastore's state is: the record in it, by the real kine and a real etcd."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.cluster import certificates, programs
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import unixsocket
from nixlet.node.cluster.controlplane import record
from support import apiservers, clusters, nodes, parts

pytestmark = pytest.mark.timeout(120)

ANOTHER = r"^the state at --datastore-endpoint is another cluster's: its certificate authority has the hash [0-9a-f]{12}…, and the one in .*/two/data/server/tls [0-9a-f]{12}…$"
EMPTY = r"^what --datastore-endpoint names has no state of the cluster in .*/one/data, which would begin empty there$"


def made(directory: Path, **changes: Any) -> ClusterSettings:
    """A server's settings, with its authorities."""
    cluster = clusters.settings(directory, **changes)
    certificates.ensure(cluster, clusters.NOW)
    return cluster


@contextlib.contextmanager
def started(argv: list[str], directory: Path) -> Iterator[None]:
    with (
        (directory / f"{os.path.basename(argv[0])}.log").open("ab") as log,
        subprocess.Popen(argv, cwd=directory, stdout=log, stderr=log, stdin=subprocess.DEVNULL) as process,
    ):
        try:
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def kine(cluster: ClusterSettings) -> Iterator[None]:
    """kine for a server."""
    socket = Path(cluster.layout.kine_socket)
    socket.parent.mkdir(parents=True, exist_ok=True)
    with started([str(parts.directories()["kine"] / "kine"), *programs.kine(cluster)], socket.parent):
        nodes.until(lambda: unixsocket.is_served(str(socket)), "kine serves")
        yield


async def one_server_s(one: ClusterSettings, two: ClusterSettings) -> None:
    """The state is the first one's, whatever the second asks, and however often."""
    await record.check(one, known="")
    for known in ("", "/m", ""):
        with pytest.raises(errors.FailedPreconditionError, match=ANOTHER) as caught:
            await record.check(two, known=known)
        assert "name an empty database for this one" in caught.value.hint
        await record.check(one, known=known)


async def test_a_database_behind_kine(tmp_path: Path) -> None:
    def shared(name: str) -> str:
        return f"sqlite://{tmp_path}/{name}.db?_journal=WAL&cache=shared&_busy_timeout=30000&_txlock=immediate"

    one, two = (made(tmp_path / name, datastore_endpoint=shared("state")) for name in ("one", "two"))
    with kine(one), kine(two):
        await one_server_s(one, two)
    other = made(tmp_path / "one", datastore_endpoint=shared("other"))
    with kine(other):
        with pytest.raises(errors.FailedPreconditionError, match=EMPTY) as caught:
            await record.check(other, known="/m")
        assert caught.value.hint.startswith("give the endpoint as before")
        assert caught.value.hint.endswith("remove /m")
    # Nothing was written by that.
    third = made(tmp_path / "three", datastore_endpoint=shared("other"))
    with kine(third):
        await record.check(third, known="")


@contextlib.contextmanager
def etcd(cluster: ClusterSettings, *arguments: str) -> Iterator[None]:
    Path(cluster.layout.database).mkdir(parents=True)
    with started(["etcd", *programs.etcd(cluster), *arguments], Path(cluster.data_dir)):
        yield


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_an_etcd_of_somebody_s(tmp_path: Path, tls: bool) -> None:
    with contextlib.ExitStack() as stack:
        port, peer, metrics = (stack.enter_context(apiservers.kept_port()) for _ in range(3))
        await an_etcd(tmp_path, tls=tls, port=port, peer=peer, metrics=metrics)


async def an_etcd(tmp_path: Path, *, tls: bool, port: int, peer: int, metrics: int) -> None:
    theirs = made(tmp_path / "theirs", node_ips=(apiservers.LOOPBACK,))
    scheme = "https" if tls else "http"
    url = f"{scheme}://127.0.0.1:{port}"
    arguments = [
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls=https://127.0.0.1:{peer}",
        f"--initial-advertise-peer-urls=https://127.0.0.1:{peer}",
        f"--initial-cluster={theirs.node_name}=https://127.0.0.1:{peer}",
        f"--listen-metrics-urls=http://127.0.0.1:{metrics}",
        *([] if tls else ["--client-cert-auth=false", "--trusted-ca-file=", "--cert-file=", "--key-file="]),
    ]
    places = theirs.layout
    files = {
        "datastore_cafile": places.tls("etcd/server-ca.nochain.crt"),
        "datastore_certfile": places.tls("etcd/client.crt"),
        "datastore_keyfile": places.tls("etcd/client.key"),
    }
    # (nobody answers at the first)
    endpoint = f"{scheme}://127.0.0.1:1,{url}"
    one, two = (made(tmp_path / name, datastore_endpoint=endpoint, **(files if tls else {})) for name in ("one", "two"))
    with etcd(theirs, *arguments):
        health = ["curl", "-sf", f"http://127.0.0.1:{metrics}/health"]
        nodes.until(lambda: subprocess.run(health, capture_output=True, check=False).returncode == 0, "etcd serves")
        await one_server_s(one, two)
        if tls:
            stranger = made(tmp_path / "one", datastore_endpoint=url, datastore_cafile=one.layout.tls("server-ca.crt"))
            with pytest.raises(
                errors.UnavailableError, match=f"isn't known: etcd at 127.0.0.1:{port} can't be reached: "
            ):
                await record.check(stranger, known="/m")
    with pytest.raises(errors.UnavailableError, match=r"isn't known: etcd at 127\.0\.0\.1:1 can't be reached: "):
        await record.check(one, known="/m")
