"""What a cluster is refused for, or ends by. In a file of its own: no other cluster may run here, whose ports and networks it would find."""

import socket
from pathlib import Path

import pytest

from support import kubernetes, nodes

pytestmark = pytest.mark.timeout(300)


def test_a_port_that_somebody_has(tmp_path: Path) -> None:
    """It is told before anything is started."""
    made = kubernetes.Cluster(68, tmp_path, "--https-listen-port", "7443")
    with kubernetes.cleaned_up(made), socket.create_server((made.address, 7443)):
        assert made.launch().wait(60) == 125
        printed = made.log.read_text()
        assert f"kube-apiserver can't listen at {made.address} port 7443: Address already in use" in printed
        assert "sport = :7443" in printed
        assert "etcd is ready" not in printed


def test_a_program_that_does_not_start(tmp_path: Path) -> None:
    """The node ends with its last lines, and says where the rest of them is."""
    made = kubernetes.Cluster(67, tmp_path, "--kube-scheduler-arg", "no-such-flag=1")
    with kubernetes.cleaned_up(made):
        assert made.launch().wait(120) != 0
        printed = made.log.read_text()
        assert "error: kube-scheduler ended with status" in printed
        assert "unknown flag: --no-such-flag" in printed
        assert f"its log is {made.data_dir}/agent/logs/kube-scheduler.log" in printed
        # Nothing of it runs on.
        assert nodes.processes_below(made.data_dir) == []
