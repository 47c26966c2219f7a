"""What the runtime tells of its runtimes, where CRI has no word for it."""

import json
from pathlib import Path

import pytest
from grpclib import const

from nixlet.containerd import cri
from nixlet.host import unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc import server
from nixlet.rpc.gen import cri_pb2

CONFIG = {
    "containerd": {
        "defaultRuntimeName": "runc",
        "runtimes": {
            "runc": {"options": {"BinaryName": "", "SystemdCgroup": True}},
            "crun": {"options": {"SystemdCgroup": False}},
            "kata": {"options": None},
        },
    }
}


class Runtime:
    """Tells its configuration, as containerd does."""

    def __init__(self, info: dict[str, str]) -> None:
        self._info = info

    async def _status(self, stream: "server.Stream[cri_pb2.StatusRequest, cri_pb2.StatusResponse]") -> None:
        assert (await server.request(stream)).verbose
        await stream.send_message(cri_pb2.StatusResponse(info=self._info))

    def __mapping__(self) -> dict[str, const.Handler]:
        kinds = (cri_pb2.StatusRequest, cri_pb2.StatusResponse)
        return {"/runtime.v1.RuntimeService/Status": const.Handler(self._status, const.Cardinality.UNARY_UNARY, *kinds)}


@pytest.mark.parametrize(
    ("info", "handler", "wanted"),
    [
        ({"config": json.dumps(CONFIG)}, "", True),
        ({"config": json.dumps(CONFIG)}, "runc", True),
        ({"config": json.dumps(CONFIG)}, "crun", False),
        ({"config": json.dumps(CONFIG)}, "kata", False),
        ({"config": json.dumps(CONFIG)}, "missing", False),
        ({}, "", False),
    ],
)
async def test_who_makes_the_cgroups_of_a_runtime(
    tmp_path: Path, info: dict[str, str], handler: str, wanted: bool
) -> None:
    path = str(tmp_path / "run" / "c.sock")
    async with server.serve(unixsocket.listen(path), [Runtime(info)]), channels.connect(path) as channel:
        assert await cri.RuntimeClient(channel, path).systemd_cgroup(handler) is wanted
