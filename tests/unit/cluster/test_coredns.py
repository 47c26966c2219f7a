import dataclasses
import ipaddress
from pathlib import Path
from typing import Any

import pytest
import yaml

from nixlet.cluster import coredns
from support import clusters


def objects(tmp_path: Path, image: coredns.Image, **changes: Any) -> dict[str, Any]:
    made = coredns.manifest(clusters.settings(tmp_path, **changes), image, forwards=True)
    return {each["kind"]: each for each in yaml.safe_load_all(made)}


def test_the_objects_that_others_rely_on_have_their_names(tmp_path: Path) -> None:
    found = objects(tmp_path, coredns.Image("registry.example/coredns:1"))
    names = {kind: each["metadata"]["name"] for kind, each in found.items()}
    assert names == {
        "ServiceAccount": "coredns",
        "ClusterRole": "system:coredns",
        "ClusterRoleBinding": "system:coredns",
        "ConfigMap": "coredns",
        "Deployment": "coredns",
        "Service": "kube-dns",
    }
    service = found["Service"]["spec"]
    assert service["clusterIPs"] == ["10.43.0.10"]
    assert service["selector"] == found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert "replicas" not in found["Deployment"]["spec"]


def test_an_image_of_one_node_is_pulled_nowhere(tmp_path: Path) -> None:
    anywhere = objects(tmp_path, coredns.Image("registry.example/coredns:1"))["Deployment"]["spec"]["template"]["spec"]
    assert anywhere["containers"][0]["imagePullPolicy"] == "IfNotPresent"
    assert anywhere["nodeSelector"] == {"kubernetes.io/os": "linux"}
    here = objects(tmp_path, coredns.Image("localhost/nixlet/coredns:1", "node-1"))["Deployment"]["spec"]["template"][
        "spec"
    ]
    assert here["containers"][0]["imagePullPolicy"] == "Never"
    assert here["nodeSelector"] == {"kubernetes.io/os": "linux", "kubernetes.io/hostname": "node-1"}


def test_the_service_has_an_address_of_each_version(tmp_path: Path) -> None:
    cidrs = (ipaddress.ip_network("fd00:43::/112"), ipaddress.ip_network("10.43.0.0/16"))
    service = objects(tmp_path, coredns.Image("x"), service_cidrs=cidrs)["Service"]["spec"]
    assert service["clusterIP"] == "fd00:43::a"
    assert service["clusterIPs"] == ["fd00:43::a", "10.43.0.10"]
    assert service["ipFamilies"] == ["IPv6", "IPv4"]
    assert service["ipFamilyPolicy"] == "RequireDualStack"


@pytest.mark.parametrize("forwards", [True, False])
def test_the_corefile(tmp_path: Path, forwards: bool) -> None:
    text = coredns.corefile("example.internal", forwards=forwards)
    assert "    kubernetes example.internal in-addr.arpa ip6.arpa {\n" in text
    assert ("    forward . /etc/resolv.conf\n" in text) is forwards
    assert "    hosts /etc/coredns/NodeHosts {\n" in text
    assert text.count("{") == text.count("}") == 4
    settings = dataclasses.replace(clusters.settings(tmp_path), cluster_domain="example.internal")
    found = list(yaml.safe_load_all(coredns.manifest(settings, coredns.Image("x"), forwards=forwards)))
    assert next(each for each in found if each["kind"] == "ConfigMap")["data"]["Corefile"] == text
