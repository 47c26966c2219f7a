"""What a server brings its cluster, and what it says where it can't."""

import dataclasses
import ipaddress
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from nixlet import errors
from nixlet.containerd import runtimes
from nixlet.node.cluster.controlplane import deploying
from nixlet.node.images import coredns
from nixlet.node.settings import config
from support import clusters


class Maker:
    """Stands for what needs a containerd and a store."""

    async def image_of(self, program: str) -> str:
        return f"localhost/nixlet/coredns:{Path(program).name}"


@pytest.fixture
def resolv_conf(tmp_path: Path) -> Path:
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver 192.0.2.53\n")
    return file


def settings_at(directory: Path, **said: Any) -> config.Settings:
    return config.Settings(data_dir=str(directory / "data"), state_dir=str(directory / "run"), **said)


async def manifest(tmp_path: Path, *, made: bool = True, dns: Any = (), **said: Any) -> dict[str, Any]:
    """The objects of the cluster's DNS, by kind."""
    settings = settings_at(tmp_path, resolv_conf=str(tmp_path / "resolv.conf"), **said)
    cluster = dataclasses.replace(clusters.settings(tmp_path), cluster_dns=dns)
    if "service_cidr" in said:
        cluster = dataclasses.replace(cluster, service_cidrs=(ipaddress.ip_network(said["service_cidr"]),))
    maker = cast("coredns.Maker", Maker()) if made else None
    text = await deploying.dns_manifest(settings, cluster, maker)
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def installed(directory: Path, *names: str) -> str:
    directory.mkdir()
    for name in names:
        (directory / name).write_text("")
        (directory / name).chmod(0o755)
    return str(directory)


def image(found: dict[str, Any]) -> str:
    return str(found["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"])


async def test_an_image_that_is_named_is_taken_as_it_is(tmp_path: Path, resolv_conf: Path) -> None:
    bin_dir = installed(tmp_path / "bin", "coredns")
    found = await manifest(tmp_path, coredns_image="r.example/c:1", kubernetes_bin_dir=bin_dir, made=False)
    assert image(found) == "r.example/c:1"
    assert "forward" in found["ConfigMap"]["data"]["Corefile"]


async def test_the_program_is_found_beside_kubernetes_or_on_path(
    tmp_path: Path, resolv_conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", installed(tmp_path / "path", "coredns"))
    empty = installed(tmp_path / "empty")
    assert image(await manifest(tmp_path, kubernetes_bin_dir=empty)) == "localhost/nixlet/coredns:coredns"
    found = await manifest(tmp_path)
    assert found["Deployment"]["spec"]["template"]["spec"]["nodeSelector"]["kubernetes.io/hostname"] == "node-1"


async def test_a_machine_without_name_servers_knows_the_cluster_s_names_alone(
    tmp_path: Path, resolv_conf: Path
) -> None:
    resolv_conf.write_text("search example\n")
    found = await manifest(tmp_path, coredns_image="r.example/c:1")
    assert "forward" not in found["ConfigMap"]["data"]["Corefile"]


@pytest.mark.parametrize(
    ("program", "said", "why"),
    [
        (False, {}, "there is no program coredns on this machine"),
        (True, {"made": False}, r"of /.*/coredns an image can be made for the snapshotter nix only"),
        (True, {"disable_agent": True}, "this server runs no pods"),
        (True, {"service_cidr": "10.43.0.0/29"}, "--service-cidr has no tenth address"),
    ],
)
async def test_a_cluster_without_dns_is_told_why(
    tmp_path: Path,
    resolv_conf: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: bool,
    said: dict[str, Any],
    why: str,
) -> None:
    monkeypatch.setenv("PATH", installed(tmp_path / "path", *(["coredns"] if program else [])))
    with pytest.raises(errors.FailedPreconditionError, match=rf"^the cluster has no DNS: .*{why}") as caught:
        await manifest(tmp_path, **said)
    assert "--disable coredns" in caught.value.hint


async def test_without_kubectl_nothing_is_applied_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", installed(tmp_path / "path"))
    settings = settings_at(tmp_path, disable=("traefik, coredns",))
    deployer = deploying.deployer(settings, clusters.settings(tmp_path), None)
    await deployer.look()
    assert deployer.problems[""].startswith("the program kubectl is not installed")
    assert deployer.remark() == deployer.problems[""]


async def test_classes_of_runtimes_are_a_manifest_like_others(tmp_path: Path) -> None:
    """It can be disabled, and is known again when the node is taken away."""
    cluster = clusters.settings(tmp_path)
    await deploying.deployer(settings_at(tmp_path, disable=("coredns",)), cluster, None).bring()
    (path,) = deploying.written(cluster.layout)
    found = list(yaml.safe_load_all(Path(path).read_text()))
    assert Path(path).name == "runtimes.yaml"
    assert {each["handler"] for each in found} == runtimes.NAMES
    assert all(each["metadata"] == {"name": each["handler"]} and each["kind"] == "RuntimeClass" for each in found)
    await deploying.deployer(settings_at(tmp_path, disable=("coredns", "runtimes")), cluster, None).bring()
    assert deploying.written(cluster.layout) == []
