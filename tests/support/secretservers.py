"""As much of an API server as holds Secrets and knows Nodes, for tests of what is kept there."""

import base64
import json
import uuid
from typing import Any

from support.apiservers import Asked, Reply

SECRETS = "/api/v1/namespaces/kube-system/secrets"
NODES = "/api/v1/nodes"


def refusal(code: int, reason: str) -> Reply:
    return Reply(code, json.dumps({"message": reason, "reason": reason, "code": code}).encode())


class Secrets:
    """Secrets of kube-system by name, and the names of nodes."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, Any]] = {}
        self.nodes: set[str] = set()
        self.addresses: dict[str, str] = {}
        self.made_at = "2026-01-01T00:00:00Z"
        self.down = False

    def answer(self, asked: Asked) -> Reply:
        path = asked.path.partition("?")[0]
        if self.down:
            return refusal(503, "ServiceUnavailable")
        if path.startswith(NODES):
            name = path.removeprefix(NODES).strip("/")
            if not name:
                items = [self._node(each) for each in sorted(self.nodes)]
                return Reply(body=json.dumps({"items": items, "metadata": {}}).encode())
            return Reply(body=b"{}") if name in self.nodes else refusal(404, "NotFound")
        name = path.removeprefix(SECRETS).removeprefix("/")
        if asked.method == "POST":
            return self._create(json.loads(asked.body))
        if not name:
            return Reply(body=json.dumps({"items": list(self.held.values()), "metadata": {}}).encode())
        if name not in self.held:
            return refusal(404, "NotFound")
        if asked.method == "PATCH":
            return self._patch(self.held[name], json.loads(asked.body)["metadata"])
        if asked.method == "DELETE":
            uid = json.loads(asked.body).get("preconditions", {}).get("uid")
            if uid not in {None, self.held[name]["metadata"].get("uid")}:
                return refusal(409, "Conflict")
            return Reply(body=json.dumps(self.held.pop(name)).encode())
        return Reply(body=json.dumps(self.held[name]).encode())

    def _node(self, name: str) -> dict[str, Any]:
        found = [{"type": "Hostname", "address": name}]
        if name in self.addresses:
            found.append({"type": "InternalIP", "address": self.addresses[name]})
        return {"metadata": {"name": name}, "status": {"addresses": found}}

    def _create(self, new: dict[str, Any]) -> Reply:
        name = new["metadata"]["name"]
        if name in self.held:
            return refusal(409, "AlreadyExists")
        new["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": self.made_at}
        new["metadata"]["resourceVersion"] = "1"
        self.held[name] = new
        return Reply(201, json.dumps(new).encode())

    def _patch(self, held: dict[str, Any], metadata: dict[str, Any]) -> Reply:
        if metadata.pop("resourceVersion") != held["metadata"]["resourceVersion"]:
            return refusal(409, "Conflict")
        held["metadata"].setdefault("annotations", {}).update(metadata.pop("annotations"))
        held["metadata"]["resourceVersion"] = str(int(held["metadata"]["resourceVersion"]) + 1)
        assert not metadata
        return Reply(body=json.dumps(held).encode())

    def data(self, name: str) -> dict[str, str]:
        return {key: base64.b64decode(value).decode() for key, value in self.held[name]["data"].items()}
