"""A cluster whose state is in sqlite, by k3s's own datastore."""

import contextlib
import os
import re
import ssl
import subprocess
from pathlib import Path

import pytest

from nixlet.cluster import programs
from nixlet.host import unixsocket
from nixlet.node.cluster.preflight import versions
from support import clusters, disks, kubernetes, nodes, parts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def kine_of(cluster: kubernetes.Cluster) -> list[int]:
    """Its processes."""
    return nodes.named(cluster, "kine")


def kept(cluster: kubernetes.Cluster) -> bool:
    return cluster.kubectl("get", "configmap", "kept", "-o", "jsonpath={.data.a}", check=False) == "1"


#: The first address of services, where the API server is.
API_SERVER = ("10.43.0.1", 443)


def is_reached_as_a_service(cluster: kubernetes.Cluster) -> bool:
    with contextlib.suppress(OSError):
        return ssl.get_server_certificate(API_SERVER) == ssl.get_server_certificate((cluster.address, 6443))
    return False


def chains_of_services() -> list[str]:
    """What kube-proxy has in the packet filter where it has no nftables."""
    return re.findall(
        "KUBE-SVC-.*", subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    )


def test_the_state_is_kept_by_kine(tmp_path: Path) -> None:
    """And services are made by iptables, as on a machine without nftables."""
    cluster = kubernetes.Cluster(66, tmp_path, "--kube-proxy-arg", "proxy-mode=iptables")
    cluster.environment["PATH"] = f"{parts.directories()['kine']}:{cluster.environment['PATH']}"
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, [str(parts.kubernetes() / "kube-proxy"), "--cleanup"], check=False)
        stack.enter_context(kubernetes.cleaned_up(cluster))
        cluster.start()
        cluster.await_node()
        database = cluster.data_dir / "server" / "db"
        assert (database / "state.db").exists()
        assert not (database / "etcd").exists()
        assert database.stat().st_mode & 0o077 == 0
        cluster.kubectl("create", "configmap", "kept", "--from-literal=a=1")
        # What was acknowledged outlives it.
        (first,) = kine_of(cluster)
        os.kill(first, 9)
        kubernetes.until(lambda: kine_of(cluster) not in ([], [first]), "kine is started again")
        kubernetes.until(lambda: kept(cluster), f"the API server answers again: {cluster.log}")
        cluster.kubectl("create", "configmap", "later", "--from-literal=a=2")
        assert cluster.stop() == 0
        cluster.start()
        cluster.await_node()
        assert kept(cluster)
        # Where it was made it stays, though etcd is there, too.
        assert not (database / "etcd").exists()
        assert len(kine_of(cluster)) == 1
        assert chains_of_services()
        assert "kube-proxy" not in cluster.packet_tables()
        kubernetes.until(lambda: is_reached_as_a_service(cluster), "the API server is reached as a service")
        assert cluster.stop() == 0
        cluster.ok("uninstall", "--data-dir", str(cluster.data_dir), "--yes")
        assert chains_of_services() == []


async def test_a_database_s_address_is_in_no_command_line(tmp_path: Path) -> None:
    """The real program says that it takes it from the environment, and does."""
    program = parts.directories()["kine"] / "kine"
    database = tmp_path / "elsewhere.db"
    cluster = clusters.settings(
        tmp_path, datastore_endpoint=f"sqlite://{database}?_journal=WAL&cache=shared&word=se-cret"
    )
    assert await versions.takes_variable(str(program), "KINE_ENDPOINT")
    Path(cluster.layout.kine_socket).parent.mkdir(parents=True)
    argv = [str(program), *programs.kine(cluster, hidden=True)]
    assert "se-cret" not in "".join(argv)
    environment = {**os.environ, "KINE_ENDPOINT": programs.kine_endpoint(cluster)}
    with subprocess.Popen(argv, env=environment, cwd=tmp_path) as kine:
        try:
            nodes.until(lambda: unixsocket.is_served(cluster.layout.kine_socket), "kine serves")
        finally:
            kine.kill()
    assert database.exists()
    # (its own choice, where it is told nothing)
    assert not (tmp_path / "db").exists()


def test_one_database(tmp_path: Path) -> None:
    """Another server at the same one is refused, and so is another database for the same server: both would take the cluster apart."""
    path = f"{parts.directories()['kine']}:{os.environ['PATH']}"

    def server(number: int, name: str, database: str) -> kubernetes.Cluster:
        (tmp_path / name).mkdir(exist_ok=True)
        endpoint = f"sqlite://{tmp_path}/{database}.db?_journal=WAL&cache=shared&_busy_timeout=30000"
        made = kubernetes.Cluster(number, tmp_path / name, "--disable", "coredns", "--datastore-endpoint", endpoint)
        made.environment["PATH"] = f"{path}:{made.environment['PATH']}"
        return made

    first = server(66, "one", "state")
    with kubernetes.cleaned_up(first):
        first.start()
        first.await_node()
        first.kubectl("create", "configmap", "kept", "--from-literal=a=1")
        assert first.stop() == 0
        second = server(65, "two", "state")
        with kubernetes.cleaned_up(second):
            assert second.launch().wait(120) == 125
            assert "the state at --datastore-endpoint is another cluster's" in second.log.read_text()
            # No API server of it has been there.
            assert not (second.data_dir / "agent/logs/kube-apiserver.log").exists()
        elsewhere = server(66, "one", "empty")
        assert elsewhere.launch().wait(120) == 125
        assert "has no state of the cluster in" in elsewhere.log.read_text()
        first.start()
        first.await_node()
        assert kept(first)
        assert kine_of(first) != []


def test_a_disk_that_gets_full(tmp_path: Path) -> None:
    """kine would acknowledge what it has no room for: it is ended before, which is told, and goes on when there is room."""
    cluster = kubernetes.Cluster(64, tmp_path, "--disable", "coredns")
    cluster.environment["PATH"] = f"{parts.directories()['kine']}:{cluster.environment['PATH']}"
    place = cluster.data_dir / "server" / "db"
    place.parent.mkdir(parents=True)
    with disks.disk("ext4", place, 160), kubernetes.cleaned_up(cluster):
        cluster.start()
        cluster.await_node()
        acknowledged: list[str] = []
        refused = 0
        ballast = place / "ballast"
        ballast.mkdir()
        with (ballast / "blocks").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while refused < 3:
                file.write(bytes(4 << 20))
                name = f"kept-{len(acknowledged)}-{refused}"
                if cluster.keeps(name):
                    acknowledged.append(name)
                else:
                    refused += 1
        disks.fill(ballast)
        sentence = f"the file system of {place} is full, and the cluster takes no changes until there is room: kine"
        kubernetes.until(lambda: sentence in cluster.log.read_text(), f"it is told: {cluster.log}")
        kubernetes.until(
            lambda: "kine is not started with less than 32" in cluster.log.read_text(), "why it doesn't start"
        )
        assert kine_of(cluster) == []
        assert not cluster.keeps("meanwhile")
        disks.make_room(place)
        kubernetes.until(lambda: cluster.keeps("after"), f"the cluster goes on: {cluster.log}")
        cluster.await_node()
        names = {each["metadata"]["name"] for each in cluster.get("configmaps")["items"]}
        assert names.issuperset({*acknowledged, "after"})
        assert acknowledged
