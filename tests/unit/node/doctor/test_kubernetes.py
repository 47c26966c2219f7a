"""What doctor says of a node that is a cluster, or would be one."""

import contextlib
import inspect
import ipaddress
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.cluster import certificates, kubeconfigs, validation
from nixlet.host import network, process
from nixlet.node.cluster.preflight import finding, kernel, versions
from nixlet.node.doctor import kubernetes, machine, netprobe
from nixlet.node.settings import config
from support import apiservers, clusters

PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The programs that are on PATH."""
    found = set(PROGRAMS)
    monkeypatch.setattr(process, "find_program", lambda name: f"/bin/{name}" if name in found else None)
    return found


def settings_at(directory: Path, **said: Any) -> config.Settings:
    given = {"node_ip": ("192.0.2.7",), "node_name": "node-1", **said}
    return config.Settings(data_dir=f"{directory}/data", state_dir=f"{directory}/run", **given)


async def looked(settings: config.Settings, name: str) -> str:
    seen = kubernetes.looks(settings)[name]()
    return await seen if inspect.isawaitable(seen) else seen


async def test_a_node_alone(tmp_path: Path, installed: set[str]) -> None:
    installed -= {"kubelet"}
    settings = settings_at(tmp_path)
    assert set(kubernetes.looks(settings)) == {"cluster"}
    assert "the node is alone" in await looked(settings, "cluster")
    assert kubernetes.with_pods(settings).pod_cidr == "10.63.0.0/16"
    settings = settings_at(tmp_path, kubernetes="yes")
    assert set(kubernetes.looks(settings)) == {"programs"}
    with pytest.raises(errors.UnavailableError, match="kubelet is not on PATH"):
        await looked(settings, "programs")


async def test_pods_have_the_cluster_s_network(tmp_path: Path, installed: set[str]) -> None:
    settings = settings_at(tmp_path)
    assert kubernetes.with_pods(settings).pod_cidr == "10.42.0.0/16"
    Path(settings.layout.agent).mkdir(parents=True)
    Path(settings.layout.agent, "pod-network.json").write_text('{"node":"node-1","pod_cidr":"10.42.5.0/24"}')
    assert kubernetes.with_pods(settings).pod_cidr == "10.42.5.0/24"


async def test_programs_and_their_versions(
    tmp_path: Path, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = dict.fromkeys(PROGRAMS, "1.36.3")

    async def ask(found: finding.Found, layout: config.Layout) -> dict[str, str]:
        return said

    monkeypatch.setattr(versions, "ask", ask)
    settings = settings_at(tmp_path)
    assert "kubelet 1.36.3" in await looked(settings, "programs")
    said["kubelet"] = "1.37.0"
    with pytest.raises(errors.FailedPreconditionError, match="newer than"):
        await looked(settings, "programs")


async def test_settings_that_make_none(tmp_path: Path, installed: set[str]) -> None:
    assert "node node-1 at 192.0.2.7, API server at https://192.0.2.7:6443" in await looked(
        settings_at(tmp_path), "settings"
    )
    with pytest.raises(errors.InvalidArgumentError, match="loopback"):
        await looked(settings_at(tmp_path, node_ip=("127.0.0.1",)), "settings")


async def test_how_services_are_made(tmp_path: Path, installed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    mode = kernel.NFTABLES

    async def proxy_mode() -> str:
        return mode

    monkeypatch.setattr(kernel, "proxy_mode", proxy_mode)
    settings = settings_at(tmp_path)
    assert await looked(settings, "services") == "kube-proxy makes them with nftables"
    mode = kernel.IPTABLES
    with pytest.raises(machine.Worse, match="iptables"):
        await looked(settings, "services")
    assert "nothing of ours" in await looked(settings_at(tmp_path, disable_kube_proxy=True), "services")


async def test_how_pods_packets_get_to_other_nodes(
    tmp_path: Path, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def vxlan() -> str:
        return "an interface can be made"

    monkeypatch.setattr(netprobe, "vxlan", vxlan)
    agent = {"server": "https://192.0.2.7:6443", "token": "x"}
    assert "nothing of nixlet's" in await looked(settings_at(tmp_path), "flannel")
    with pytest.raises(machine.Worse, match="flanneld is not there") as caught:
        await looked(settings_at(tmp_path, **agent), "flannel")
    assert "releases" in caught.value.remedy
    installed |= {"flanneld"}
    assert await looked(settings_at(tmp_path), "flannel") == "/bin/flanneld: an interface can be made"
    assert await looked(settings_at(tmp_path, **agent), "flannel") == "/bin/flanneld: an interface can be made"
    assert "one network (host-gw)" in await looked(settings_at(tmp_path, flannel_backend="host-gw"), "flannel")
    assert "isn't nixlet's" in await looked(settings_at(tmp_path, container_runtime_endpoint="/c"), "flannel")


async def test_a_machine_without_a_default_route(
    tmp_path: Path, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {"10.43.0.1": ipaddress.IPv4Address("192.0.2.7")}
    monkeypatch.setattr(network, "outgoing_address", ways.get)
    settings = settings_at(tmp_path)
    assert "can be reached" in await looked(settings, "route")
    ways.clear()
    with pytest.raises(machine.Worse, match=r"no route to 10\.43\.0\.0/16") as caught:
        await looked(settings, "route")
    assert "ip route add 10.43.0.0/16" in caught.value.remedy


async def test_certificates(tmp_path: Path, installed: set[str]) -> None:
    settings = settings_at(tmp_path)
    assert await looked(settings, "certificates") == "they are made at the first start"
    cluster = clusters.settings(tmp_path, embedded_etcd=True)
    certificates.ensure(cluster, clusters.NOW)
    assert "are valid; the first ends on " in await looked(settings, "certificates")
    Path(cluster.layout.tls("client-admin.crt")).write_text("x")
    with pytest.raises(machine.Worse, match=r"client-admin\.crt: does not fit"):
        await looked(settings, "certificates")


async def test_an_authority_with_which_no_node_starts(tmp_path: Path, installed: set[str]) -> None:
    settings = settings_at(tmp_path)
    cluster = clusters.settings(tmp_path, embedded_etcd=True)
    certificates.ensure(cluster, clusters.NOW)
    for name, text in (("server-ca.crt", b"x"), ("server-ca.key", b""), ("client-ca.crt", None)):
        file = Path(cluster.layout.tls(name))
        kept = file.read_bytes()
        if text is None:
            file.unlink()
        else:
            file.write_bytes(text)
        with pytest.raises(errors.FailedPreconditionError):
            certificates.ensure(cluster, clusters.NOW)
        with pytest.raises(errors.FailedPreconditionError, match=f"no node starts with this authority: .*{name[:-4]}"):
            await looked(settings, "certificates")
        file.write_bytes(kept)
        file.chmod(0o600)
    assert "are valid" in await looked(settings, "certificates")


async def test_ports_that_somebody_has(tmp_path: Path, installed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "address_problem", lambda _: "")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as somebody:
        port = somebody.getsockname()[1]
        settings = settings_at(tmp_path, node_ip=("127.0.0.1",), https_listen_port=str(port))
        with pytest.raises(
            errors.FailedPreconditionError, match=f"kube-apiserver can't listen at 127.0.0.1 port {port}: "
        ):
            await looked(settings, "ports")


async def test_where_things_are(tmp_path: Path, installed: set[str]) -> None:
    settings = settings_at(tmp_path)
    assert await looked(settings, "kubeconfig") == f"{tmp_path}/data/kubeconfig.yaml"
    assert f"{tmp_path}/data/agent/etc/kubelet.conf.d" in await looked(settings, "kubelet")


async def test_an_agent_is_told_of_what_it_joins_and_not_of_a_server(tmp_path: Path, installed: set[str]) -> None:
    installed -= {"etcd", "kube-apiserver"}
    port = apiservers.closed_port()
    settings = settings_at(tmp_path, server=f"https://127.0.0.1:{port - 1}", token="x")
    assert await looked(settings, "settings") == "node node-1 at 192.0.2.7"
    with pytest.raises(machine.Worse, match="no server of nixlet's answers where nodes would join"):
        await looked(settings, "cluster")
    assert await looked(settings, "certificates") == "the cluster gives them"
    assert "kubeconfig" not in kubernetes.looks(settings)
    cluster = apiservers.made(tmp_path / "server")
    with apiservers.serving(lambda _: apiservers.Reply(), apiservers.context(cluster)) as there:
        server = f"https://127.0.0.1:{there.port - 1}"
        settings = settings_at(tmp_path, server=server, token="x")
        assert await looked(settings, "cluster") == f"a server of nixlet's lets nodes in for {server}"
    shutil.copytree(cluster.layout.agent, settings.layout.agent)
    assert (await looked(settings, "certificates")).startswith("5 are valid; the first ends on ")
    Path(settings.layout.agent, "client-kubelet.key").unlink()
    with pytest.raises(machine.Worse, match=r"client-kubelet.crt: does not fit"):
        await looked(settings, "certificates")


async def test_a_node_of_anybody_s_cluster(tmp_path: Path, installed: set[str]) -> None:
    installed &= {"kubelet"}
    path = tmp_path / "kubeconfig"
    credentials = kubeconfigs.Credentials(token="abcdef.0123456789abcdef")
    kubeconfigs.write(str(path), kubeconfigs.Kubeconfig("https://192.0.2.1:6443", credentials=credentials))
    settings = settings_at(tmp_path, kubeconfig=str(path))
    assert await looked(settings, "cluster") == "the kubelet asks https://192.0.2.1:6443 for its certificates"
    assert await looked(settings, "certificates") == "the cluster gives them"


async def test_a_kubelet_s_cgroups(tmp_path: Path, installed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As containerd was told at the last start; what Kubernetes gives up is said."""
    settings = settings_at(tmp_path)
    monkeypatch.setattr("nixlet.node.cluster.preflight.kernel.remark_on_cgroups", lambda: "they are old")
    assert (await looked(settings, "kubelet")).endswith("kubelet.conf.d; they are old")
    monkeypatch.setattr("nixlet.node.cluster.preflight.kernel.remark_on_cgroups", lambda: "")
    options = "plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc"
    file = Path(settings.layout.containerd_config)
    file.parent.mkdir(parents=True)
    file.write_text(f"version = 3\n[{options}]\nruntime_type = 'io.containerd.runc.v2'\noptions.SystemdCgroup = true\n")
    assert (await looked(settings, "kubelet")).endswith("kubelet.conf.d; its cgroup driver is systemd")


async def test_a_database_elsewhere_has_no_room_of_this_machine(tmp_path: Path, installed: set[str]) -> None:
    installed.add("kine")
    settings = settings_at(tmp_path, datastore_endpoint="mysql://u:se-cret@tcp(db)/k")
    assert await looked(settings, "datastore") == "the cluster's state is elsewhere"
    assert "kine: " in await looked(settings_at(tmp_path, datastore_endpoint="sqlite://"), "datastore")
