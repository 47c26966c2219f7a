"""The versions of a cluster's programs, and whether they go together."""

import os
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.node.cluster.preflight import finding, versions
from nixlet.node.settings import config


def program(directory: Path, name: str, says: str) -> str:
    path = directory / name
    # It notes each time that it is asked.
    path.write_text(
        f"#!/bin/sh\n[ $# = 1 ] && [ $1 = --version ] || exit 3\necho x >>{directory}/{name}.asked\necho '{says}'\n"
    )
    path.chmod(0o755)
    return str(path)


def asked(directory: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in directory.glob("*.asked"))


async def test_each_is_asked_once(tmp_path: Path) -> None:
    layout = config.Layout(str(tmp_path), str(tmp_path / "state"))
    os.mkdir(layout.state_dir)
    found = finding.Found(
        {
            "etcd": program(tmp_path, "etcd", "etcd Version: 3.4.23\nGit SHA: x"),
            "kine": program(tmp_path, "kine", "kine version v0.17.5 (abc)"),
            "kubelet": program(tmp_path, "kubelet", "Kubernetes v1.36.3"),
            "kube-proxy": program(tmp_path, "kube-proxy", "Kubernetes v0.0.0-master+$Format:%H$"),
        },
        finding.ETCD,
    )
    wanted = {"etcd": "3.4.23", "kine": "0.17.5", "kubelet": "1.36.3", "kube-proxy": ""}
    assert await versions.ask(found, layout) == wanted
    assert await versions.ask(found, layout) == wanted
    assert asked(tmp_path) == 4
    program(tmp_path, "kubelet", "Kubernetes v1.37.2 (new)")
    assert (await versions.ask(found, layout))["kubelet"] == "1.37.2"
    assert asked(tmp_path) == 5
    # Where it can't be remembered it is asked again.
    Path(versions.memory(layout)).write_text("{")
    assert await versions.ask(found, layout) == wanted | {"kubelet": "1.37.2"}


async def test_one_that_does_not_run(tmp_path: Path) -> None:
    bad = tmp_path / "kubelet"
    bad.write_text("#!/bin/sh\necho broken >&2\nexit 2\n")
    bad.chmod(0o755)
    with pytest.raises(errors.CommandFailedError, match="broken"):
        await versions.ask(finding.Found({"kubelet": str(bad)}, ""), config.Layout(str(tmp_path), str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "version", "problem"),
    [
        ("kubelet", "1.36.9", ""),
        ("kubelet", "1.33.0", ""),
        ("kubelet", "1.32.7", "kubelet 1.32.7 is more than 3 minor versions older than kube-apiserver 1.36.3"),
        ("kubelet", "1.37.0", "kubelet 1.37.0 is newer than kube-apiserver 1.36.3"),
        ("kube-proxy", "1.33.1", ""),
        ("kube-scheduler", "1.35.0", ""),
        ("kube-scheduler", "1.34.0", "kube-scheduler 1.34.0 is more than 1 minor version older than"),
        ("kube-controller-manager", "1.37.0", "kube-controller-manager 1.37.0 is newer than"),
        # Nothing is known of these.
        ("kubelet", "", ""),
        ("etcd", "3.4.23", ""),
    ],
)
def test_which_go_together(name: str, version: str, problem: str) -> None:
    if not problem:
        versions.check({"kube-apiserver": "1.36.3", name: version})
        return
    with pytest.raises(errors.FailedPreconditionError, match=problem):
        versions.check({"kube-apiserver": "1.36.3", name: version})
    versions.check({"kube-apiserver": "", name: version})
