"""The pod network: one bridge, addresses from a range, port mappings; made by the standard CNI plugins."""

import ipaddress
import json

#: The plugins that the network needs, besides "loopback", which containerd calls by itself.
PLUGINS = ("bridge", "host-local", "portmap", "loopback")

#: The name of the configuration's file; the first of the directory counts.
FILE_NAME = "10-nixlet.conflist"


def render(*, name: str, bridge: str, pod_cidr: str, data_dir: str, routed_mtu: int = 0) -> str:
    """A network configuration list (CNI specification 1.0.0).

    Args:
        name: The network's name; leases and cached results are kept under it, so it must be the node's own.
        bridge: The interface that pods are attached to.
        pod_cidr: The addresses to choose from.
        data_dir: Where the leases are kept.
        routed_mtu: The largest packet (bytes) where somebody else brings packets to other nodes' pods, and masquerades what goes further; 0: nobody does.
    """
    version = ipaddress.ip_network(pod_cidr).version
    everywhere = "0.0.0.0/0" if version == 4 else "::/0"
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": pod_cidr}]],
        "routes": [{"dst": everywhere}],
        "dataDir": data_dir,
    }
    attached: dict[str, object] = {
        "type": "bridge",
        "bridge": bridge,
        "isGateway": True,
        # It would do so towards other nodes' pods as well: it knows this node's part of the network only.
        "ipMasq": not routed_mtu,
        "hairpinMode": True,
        "ipam": ipam,
    }
    if routed_mtu:
        attached["mtu"] = routed_mtu
    plugins = [attached, {"type": "portmap", "capabilities": {"portMappings": True}}]
    return json.dumps({"cniVersion": "1.0.0", "name": name, "plugins": plugins}, indent=2) + "\n"
