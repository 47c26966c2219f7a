"""The names that a pod knows, and what the host can offer for it."""

from pathlib import Path

import pytest

from nixlet import errors
from nixlet.containers import arguments, model
from nixlet.pods import hosts, network
from nixlet.rpc.gen import cri_pb2

ALIASES = (model.HostAlias("192.0.2.1", ("db", "db.example")), model.HostAlias("2001:db8::1", ("six",)))
SAID = "192.0.2.1\tdb db.example\n2001:db8::1\tsix\n"


def test_a_pod_with_a_network_of_its_own() -> None:
    lines = hosts.render(["10.63.0.5", "fd00::5"], "web", ALIASES).splitlines()
    assert lines[:2] == ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    assert lines[-4:] == ["10.63.0.5\tweb", "fd00::5\tweb", *SAID.splitlines()]
    assert "web" not in hosts.render((), "web", ())


@pytest.mark.parametrize("text", ["127.0.0.1 localhost\n", "127.0.0.1 localhost", "", "# \udcff\n"])
def test_a_pod_on_the_hosts_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    own = tmp_path / "hosts"
    own.write_bytes(text.encode(errors="surrogateescape"))
    monkeypatch.setattr(hosts, "PLACE", str(own))
    seen = tmp_path / "seen"
    hosts.write(str(seen), hosts.of_the_host(ALIASES))
    begin = text + "\n" if text and not text.endswith("\n") else text
    assert seen.read_bytes() == (begin + SAID).encode(errors="surrogateescape")
    assert seen.stat().st_mode & 0o777 == 0o644
    own.unlink()
    assert "localhost" in hosts.of_the_host(())


@pytest.mark.parametrize(("path", "own"), [("/etc/hosts", True), ("etc/../etc/hosts", True), ("/etc", False)])
def test_a_container_may_have_a_file_of_its_own(path: str, *, own: bool) -> None:
    container = model.Container("main", "web", "Never", mounts=(model.VolumeMount("data", path),))
    assert hosts.is_mounted_by(container, "/etc/hosts") is own


def test_names_on_the_command_line() -> None:
    assert arguments.host_aliases(["db:192.0.2.1", "six:[2001:db8::1]", "Six=2001:db8::1"]) == (
        model.HostAlias("192.0.2.1", ("db",)),
        model.HostAlias("2001:db8::1", ("six",)),
        model.HostAlias("2001:db8::1", ("Six",)),
    )
    for text in ("db", "db:", ":192.0.2.1", "a b:192.0.2.1", "db:host-gateway"):
        with pytest.raises(errors.UsageError, match=r"^--add-host "):
            arguments.host_aliases([text])


def pod(*addresses: str, network: str = "bridge") -> model.Pod:
    ports = tuple(model.Port(80, 8080, address) for address in addresses)
    container = model.Container("main", "web", "Never", ports=ports)
    return model.Pod("web", containers=(container,), host_network=network == "host", no_network=network == "none")


def test_a_pods_own_addresses() -> None:
    more = [cri_pb2.PodIP(ip="fd00::5")]
    status = cri_pb2.PodSandboxStatus(network=cri_pb2.PodSandboxNetworkStatus(ip="10.63.0.5", additional_ips=more))
    assert network.addresses(status) == ("10.63.0.5", "fd00::5")


@pytest.mark.parametrize(
    ("address", "own", "missing"),
    [
        ("", ["10.63.0.5"], 0), ("127.0.0.1", ["10.63.0.5"], 0), ("::", ["10.63.0.5"], 6), ("2001:db8::1", ["10.63.0.5"], 6),
        ("0.0.0.0", ["fd00::5"], 4), ("2001:db8::1", ["10.63.0.5", "fd00::5"], 0), ("2001:db8::1", [], 0),
    ],
)  # fmt: skip
def test_ports_are_offered_at_addresses_of_a_kind_that_pods_have(address: str, own: list[str], missing: int) -> None:
    network.check_offers(pod(address))
    if not missing:
        network.check_served(pod(address), own)
        return
    with pytest.raises(errors.FailedPreconditionError, match=f"pods have no IPv{missing} addresses here"):
        network.check_served(pod(address), own)


def test_nothing_is_offered_at_the_loopback_of_ipv6() -> None:
    with pytest.raises(errors.FailedPreconditionError, match="port 8080 can't be offered at ::1: ") as caught:
        network.check_offers(pod("127.0.0.1", "::1"))
    assert caught.value.hint == "offer it at 127.0.0.1: -p 127.0.0.1:8080:80"
    network.check_offers(pod("::1", network="host"))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ('failed to connect "veth1" to bridge nixlet0: exchange full', "the bridge nixlet0 is full: the kernel connects 1,023 pods to a bridge at most"),
        ("failed to allocate for range 0: no IP addresses available in range set: 10.63.0.1-10.63.0.254", "all addresses for pods are given away"),
        ("unable to apply cgroup configuration: mkdir /sys/fs/cgroup/cpuset/k8s.io/a: permission denied", "no cgroups are delegated to this node, and containerd 2 runs no containers without"),
        ("something else", "something else"),
    ],
)  # fmt: skip
def test_why_there_is_no_network(said: str, told: str) -> None:
    assert network.explained(errors.NixletError(said)).message == told
