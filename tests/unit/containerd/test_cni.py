"""The pod network's configuration."""

import json

import pytest

from nixlet.containerd import cni


@pytest.mark.parametrize(("pod_cidr", "everywhere"), [("10.9.0.0/24", "0.0.0.0/0"), ("fd00:9::/64", "::/0")])
def test_the_configuration(pod_cidr: str, everywhere: str) -> None:
    text = cni.render(name="nixlet-br0", bridge="br0", pod_cidr=pod_cidr, data_dir="/run/n/cni")
    found = json.loads(text)
    assert text.endswith("}\n")
    assert (found["cniVersion"], found["name"]) == ("1.0.0", "nixlet-br0")
    bridge, portmap = found["plugins"]
    ipam = bridge.pop("ipam")
    assert bridge == {"type": "bridge", "bridge": "br0", "isGateway": True, "ipMasq": True, "hairpinMode": True}
    assert ipam == {
        "type": "host-local",
        "ranges": [[{"subnet": pod_cidr}]],
        "routes": [{"dst": everywhere}],
        "dataDir": "/run/n/cni",
    }
    assert portmap == {"type": "portmap", "capabilities": {"portMappings": True}}
    assert {bridge["type"], ipam["type"], portmap["type"]} < set(cni.PLUGINS)


def test_who_routes_pods_packets_masquerades_them_too() -> None:
    text = cni.render(name="n", bridge="br0", pod_cidr="10.42.1.0/24", data_dir="/run/n/cni", routed_mtu=1450)
    (bridge, _) = json.loads(text)["plugins"]
    assert (bridge["ipMasq"], bridge["mtu"], bridge["isGateway"]) == (False, 1450, True)
