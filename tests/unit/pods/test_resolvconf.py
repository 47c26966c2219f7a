"""Where pods look names up: which files serve them, and what CRI is told."""

from pathlib import Path

import pytest

from nixlet import errors
from nixlet.containers import model
from nixlet.pods import criconfig, resolvconf
from nixlet.rpc.gen import cri_pb2


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "resolv.conf"


@pytest.mark.parametrize(
    ("text", "serves"),
    [
        ("nameserver 192.0.2.1\n", True),
        ("search example.com\nnameserver 10.0.0.1\nnameserver 2001:db8::1\n", True),
        ("# nameserver 127.0.0.1\nnameserver 10.0.0.1 # the router\n", True),
        ("", False),
        ("search example.com\n", False),
        ("nameserver\n", False),
        ("nameserver localhost\n", False),
        # systemd-resolved's own; one such server is enough.
        ("nameserver 127.0.0.53\n", False),
        ("nameserver 10.0.0.1\nnameserver ::1\n", False),
        ("nameserver 169.254.169.253\n", False),
        ("nameserver fe80::1\n", False),
        ("nameserver 2001:db8::1%eth0\n", False),
        ("nameserver 224.0.0.251\n", False),
        ("nameserver 0.0.0.0\n", False),
        ("nameserver 255.255.255.255\n", False),
    ],
)
def test_which_files_serve_pods(file: Path, text: str, *, serves: bool) -> None:
    file.write_text(text)
    assert resolvconf.serves_pods(str(file)) is serves


def test_the_first_that_serves_is_taken(tmp_path: Path) -> None:
    host, upstream = tmp_path / "host", tmp_path / "upstream"
    candidates = (str(host), str(upstream))
    assert resolvconf.find(candidates) is None
    host.write_text("nameserver 127.0.0.53\n")
    assert resolvconf.find(candidates) is None
    upstream.write_text("nameserver 10.0.0.1\n")
    assert resolvconf.find(candidates) == str(upstream)
    host.write_text("nameserver 10.0.0.2\n")
    assert resolvconf.find(candidates) == str(host)
    host.unlink()
    host.mkdir()
    assert resolvconf.find(candidates) == str(upstream)


def test_what_it_says(file: Path) -> None:
    file.write_bytes(
        b"; made by hand\ndomain old.example\nsearch a.example\nnameserver 10.0.0.1\n  nameserver\t10.0.0.2 more\n"
        b"search b.example. c.example .\noptions ndots:5 edns0\noptions timeout:1\n\xff\n\n"
    )
    assert resolvconf.read(str(file)) == cri_pb2.DNSConfig(
        servers=["10.0.0.1", "10.0.0.2"],
        searches=["b.example", "c.example", "."],
        options=["ndots:5", "edns0", "timeout:1"],
    )
    file.unlink()
    with pytest.raises(errors.FailedPreconditionError, match="where pods are to look names up, can't be read: No such"):
        resolvconf.read(str(file))


def test_a_pod_on_the_hosts_network_looks_up_as_the_host_does() -> None:
    dns = cri_pb2.DNSConfig(servers=["10.0.0.1"])
    placement = criconfig.Placement("uid", "/logs", {}, "/logs/hosts")
    assert criconfig.sandbox_config(model.Pod("p"), placement, dns).dns_config == dns
    assert not criconfig.sandbox_config(model.Pod("p", host_network=True), placement, dns).HasField("dns_config")
    assert not criconfig.sandbox_config(model.Pod("p"), placement).HasField("dns_config")
