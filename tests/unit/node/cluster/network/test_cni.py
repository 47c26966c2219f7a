"""The network of a node's pods, as it is had and changed."""

import contextlib
import functools
import json
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import iptables
from nixlet.node.children import containerd_child
from nixlet.node.cluster.network import cni, podnetwork
from nixlet.node.ownership import claims
from nixlet.node.settings import config


async def test_a_flannel_that_comes_later_masquerades_in_the_place_of_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[dict[str, str]] = []

    async def remove_rules(**said: str) -> None:
        removed.append(said)

    monkeypatch.setattr(iptables, "remove_rules", remove_rules)
    settings = config.Settings(data_dir=str(tmp_path / "data"), state_dir=str(tmp_path / "run"))
    layout = settings.layout
    Path(layout.cni_conf_dir).mkdir(parents=True)
    Path(podnetwork.memory(layout)).write_text('{"node":"node-1","pod_cidr":"10.42.3.0/24"}')

    def made() -> cni.PodNetwork:
        return cni.PodNetwork(settings)

    def attached() -> tuple[bool, int]:
        (file,) = Path(layout.cni_conf_dir).iterdir()
        plugin = json.loads(file.read_text())["plugins"][0]
        return plugin["ipMasq"], plugin.get("mtu", 0)

    pods = made()
    assert pods.routed_mtu == 0
    await pods._have_routed(1450)
    assert attached() == (False, 1450)
    # Of each pod that is there, which would have kept its rules for ever.
    assert removed == [{"network": "nixlet-nixlet0", "chain": "POSTROUTING"}]
    pods = made()
    assert pods.routed_mtu == 1450
    await pods._have_routed(1450)
    await pods._have_routed(8950)
    assert attached() == (False, 8950)
    assert len(removed) == 1
    # And back.
    await pods._have_routed(0)
    assert attached() == (True, 0)
    assert (len(removed), made().routed_mtu) == (1, 0)


def test_a_network_of_pods_that_can_not_be_had_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence stays true: the claim of the first try isn't in the way of the second."""
    directory = tmp_path / "claims"
    said = config.Settings(data_dir=str(tmp_path / "data"), state_dir=str(tmp_path / "run"), bridge="nixlet-none")
    pods = cni.PodNetwork(said)
    claim = functools.partial(claims.pod_network, directory=str(directory))
    monkeypatch.setattr(claims, "pod_network", claim)
    refusals = [errors.FailedPreconditionError("the bridge has another address")] * 2

    def clear(*_: object, **__: object) -> None:
        if refusals:
            raise refusals.pop()

    monkeypatch.setattr(claims, "clear_gateway", clear)
    monkeypatch.setattr(containerd_child, "write_network", lambda *_: None)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            with pytest.raises(errors.FailedPreconditionError, match=r"^the bridge has another address$"):
                pods._have(stack, "10.42.0.0/24", 0)
        pods._have(stack, "10.42.0.0/24", 0)
        assert pods.settings.pod_cidr == "10.42.0.0/24"
        with pytest.raises(errors.FailedPreconditionError, match="another node"), claim("nixlet-none", "10.42.0.0/24"):
            pass
    with claim("nixlet-none", "10.42.0.0/24"):
        pass
