"""What a server tells its API server: applied until it is there."""

from typing import Any

import pytest

from nixlet import errors
from nixlet.kubeclient import resources
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.kubeclient.client import Client
from nixlet.kubeclient.endpoint import Endpoint
from nixlet.node.cluster.controlplane import bootstrap


async def test_it_is_tried_until_it_is_there(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    applied: list[str] = []
    made: dict[str, Any] = {}
    refusals = [errors.UnavailableError("not yet"), errors.PermissionDeniedError("rbac is not there")]

    async def apply(_: object, resource: resources.Resource, name: str, wanted: dict[str, Any]) -> dict[str, Any]:
        kinds = {resources.CLUSTER_ROLES: "ClusterRole", resources.CLUSTER_ROLE_BINDINGS: "ClusterRoleBinding"}
        assert (wanted["apiVersion"], wanted["kind"]) == ("rbac.authorization.k8s.io/v1", kinds[resource])
        assert wanted["metadata"] == {"name": name}
        if refusals:
            raise refusals.pop(0)
        applied.append(f"{resource.plural}/{name}")
        made[applied[-1]] = wanted
        return wanted

    async def get(_: object, resource: resources.Resource, name: str) -> dict[str, Any]:
        raise errors.NotFoundError(f"{resource.plural} {name} not found")

    monkeypatch.setattr(AsyncClient, "get", get)
    monkeypatch.setattr(AsyncClient, "apply", apply)
    monkeypatch.setattr(bootstrap, "_PAUSE", 0.001)
    await bootstrap.apply(AsyncClient(Client(Endpoint.of("https://x"))))
    assert applied == [
        "clusterrolebindings/nixlet:kube-apiserver-to-kubelets",
        "clusterrolebindings/nixlet:approve-renewed-nodes",
    ]
    without = list(applied)
    await bootstrap.apply(AsyncClient(Client(Endpoint.of("https://x"))), flannel=True)
    assert applied[len(without) :] == [
        "clusterroles/nixlet:flannel",
        *without,
        "clusterrolebindings/nixlet:flannel",
    ]
    # Nodes see each other, and write as nodes, each into its own.
    (rule,) = made["clusterroles/nixlet:flannel"]["rules"]
    assert (rule["resources"], rule["verbs"]) == (["nodes"], ["get", "list", "watch"])
    (subject,) = made["clusterrolebindings/nixlet:flannel"]["subjects"]
    assert (subject["kind"], subject["name"]) == ("Group", "system:nodes")
    # One line for however many tries, as long as it is for the same reason.
    assert [message for message in caplog.messages if "can't be applied yet" in message] == [
        "nixlet:kube-apiserver-to-kubelets can't be applied yet: not yet",
        "nixlet:kube-apiserver-to-kubelets can't be applied yet: rbac is not there",
    ]


async def test_what_is_there_already_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A webhook may let nobody write while its pods aren't there, which wait for this start."""
    there = {each["metadata"]["name"]: {**each, "metadata": {"uid": "1"}} for _, each in bootstrap.wanted(flannel=True)}
    applied: list[str] = []

    async def get(_: object, resource: resources.Resource, name: str) -> dict[str, Any]:
        if resource == resources.CLUSTER_ROLES:
            return {"apiVersion": resource.version, "kind": "ClusterRole", "rules": []}
        return there[name]

    async def apply(_: object, resource: resources.Resource, name: str, wanted: dict[str, Any]) -> dict[str, Any]:
        applied.append(f"{resource.plural}/{name}")
        return wanted

    monkeypatch.setattr(AsyncClient, "get", get)
    monkeypatch.setattr(AsyncClient, "apply", apply)
    await bootstrap.apply(AsyncClient(Client(Endpoint.of("https://x"))), flannel=True)
    # Somebody has changed the one.
    assert applied == ["clusterroles/nixlet:flannel"]
