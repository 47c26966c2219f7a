"""A cluster's start beside its node: what ends it."""

import asyncio
import contextlib
import dataclasses
import ipaddress
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from grpclib import const

from nixlet import errors
from nixlet.host import children, supervisor, unixsocket
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.node.cluster.children import preparing
from nixlet.node.cluster.controlplane import bootstrap
from nixlet.node.cluster.preflight import finding, kernel, made, ports, versions
from nixlet.node.cluster.roles.server import Server
from nixlet.node.settings import config
from nixlet.rpc import server as rpc_server
from nixlet.rpc.gen import cri_pb2
from nixlet.services import joinserver
from support import apiservers, clusters


async def at_once() -> None:
    return


def settings_at(directory: Path, **said: Any) -> config.Settings:
    return config.Settings(data_dir=str(directory / "data"), state_dir=str(directory / "run"), **said)


def child(directory: Path, name: str, script: str = "exec sleep 60", **more: Any) -> supervisor.Program:
    ready: Callable[[], Awaitable[None]] = at_once
    return supervisor.Program(
        **{
            "name": name,
            "argv": ["sh", "-c", script],
            "env": dict(os.environ),
            "log_path": str(directory / f"{name}.log"),
            "ready": ready,
            "ready_timeout": 60,
            "essential": False,
            **more,
        }
    )


@pytest.mark.parametrize("slow", ["bootstrap", "kubelet", ""])
async def test_a_containerd_given_up_while_the_rest_starts_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    dies = asyncio.Event()
    never = asyncio.Event()

    async def apply(_: object, *, flannel: bool) -> None:
        assert not flannel
        dies.set()
        if slow == "bootstrap":
            await never.wait()
        else:
            # It is ready in the very moment in which the other one is given up.
            await kept.gave_up()

    monkeypatch.setattr(bootstrap, "apply", apply)
    settings = settings_at(tmp_path, disable_agent=True)
    (tmp_path / "data/server").mkdir(parents=True)
    cluster = Server(
        settings,
        finding.Found({"kube-apiserver": "/bin/true"}, finding.ELSEWHERE),
        clusters.settings(tmp_path),
    )
    monkeypatch.setattr(AsyncClient, "of_kubeconfig", mock.Mock(return_value=contextlib.nullcontext()))
    script = f"until test -e {tmp_path}/dies; do sleep 0.02; done; echo disk broken; exit 1"
    once = supervisor.RestartPolicy(tries=0)
    kubelet_ready = never.wait if slow == "kubelet" else at_once
    async with contextlib.AsyncExitStack() as stack:
        kept = await stack.enter_async_context(children.kept_running())
        kept.start(
            child(tmp_path, "containerd", script, essential=True, restart=once),
            child(tmp_path, "kube-apiserver"),
            child(tmp_path, "kubelet", ready=kubelet_ready),
        )
        await kept.ready("containerd")
        going_on = asyncio.create_task(cluster.go_on(stack, kept))
        await asyncio.wait_for(dies.wait(), 30)
        (tmp_path / "dies").touch()
        with pytest.raises(errors.CommandFailedError, match=r"^containerd ended with status 1: disk broken$"):
            await asyncio.wait_for(going_on, 30)


def server(directory: Path, joining_port: int) -> Server:
    """A server with an API server and nothing else, where nodes join at a port of the loopback address."""
    settings = settings_at(directory, disable_agent=True)
    return Server(
        settings,
        finding.Found({"kube-apiserver": "/bin/true"}, finding.ELSEWHERE),
        clusters.settings(directory, node_ips=(apiservers.LOOPBACK,), https_listen_port=joining_port - 1),
    )


async def test_a_taken_port_for_joining_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "_GONE_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        cluster = server(tmp_path, somebody.getsockname()[1])
        async with contextlib.AsyncExitStack() as stack, children.kept_running() as kept:
            with pytest.raises(errors.FailedPreconditionError, match=r"where nodes join .*: Address already in use$"):
                await cluster.begin(stack, kept)
            assert list(kept) == []
    assert list(tmp_path.iterdir()) == []


async def test_who_comes_before_the_api_server_answers_sees_that_nodes_join_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []

    @contextlib.asynccontextmanager
    async def serve(*_: object) -> AsyncIterator[None]:
        events.append("nodes join")
        yield
        events.append("nobody joins")

    monkeypatch.setattr(joinserver, "serve", serve)
    monkeypatch.setattr(kernel, "prepare", mock.AsyncMock())
    monkeypatch.setattr(versions, "ask", mock.AsyncMock(return_value={}))
    monkeypatch.setattr(preparing, "prepare_server", mock.Mock(side_effect=lambda *_: events.append("prepared")))
    kept = mock.Mock(start=mock.Mock(side_effect=lambda *_: events.append("started")))
    with apiservers.kept_port() as port:
        async with contextlib.AsyncExitStack() as stack:
            await server(tmp_path, port).begin(stack, kept)
            assert events == ["prepared", "nodes join", "started"]
    assert events[-1] == "nobody joins"


def cluster_at(directory: Path, **programs: str) -> Server:
    settings = settings_at(directory, bridge="nixlet-none")
    return Server(
        settings,
        finding.Found(programs, finding.KINE if "kine" in programs else finding.ETCD),
        clusters.settings(directory, datastore_endpoint="mysql://u:se-cret@tcp(db)/k" if "kine" in programs else ""),
    )


@pytest.mark.parametrize("knows", [True, False])
async def test_a_password_that_others_can_read_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, knows: bool
) -> None:
    caplog.set_level(logging.WARNING)
    kine = tmp_path / "kine"
    kine.write_text(f"#!/bin/sh\necho '--endpoint value {'[$KINE_ENDPOINT]' if knows else ''}'\n")
    kine.chmod(0o755)
    assert await cluster_at(tmp_path, kine=str(kine))._hidden() is knows
    told = "the datastore-endpoint stands in kine's command line, which all users of this machine can read"
    assert caplog.messages == ([] if knows else [told])
    assert "se-cret" not in caplog.text
    assert await cluster_at(tmp_path)._hidden() is False


async def test_networks_are_looked_at_before_anything_is_made(tmp_path: Path) -> None:
    cluster = cluster_at(tmp_path)
    (tmp_path / "data/server").mkdir(parents=True)
    made.remember(cluster.settings, finding.ETCD, clusters.settings(tmp_path))
    cluster._cluster = clusters.settings(tmp_path, service_cidrs=(ipaddress.ip_network("10.53.0.0/16"),))
    async with contextlib.AsyncExitStack() as stack, children.kept_running() as kept:
        with pytest.raises(errors.FailedPreconditionError, match=r"was made with --service-cidr 10\.43\.0\.0/16"):
            await cluster.begin(stack, kept)
    assert not (tmp_path / "data/server/tls").exists()


class Runtime:
    """A containerd that tells its configuration to whoever asks for it."""

    def __init__(self, *, systemd: bool) -> None:
        self._systemd = systemd

    async def _status(self, stream: "rpc_server.Stream[cri_pb2.StatusRequest, cri_pb2.StatusResponse]") -> None:
        await rpc_server.request(stream)
        runtimes = {"runc": {"options": {"SystemdCgroup": self._systemd}}}
        said = json.dumps({"containerd": {"defaultRuntimeName": "runc", "runtimes": runtimes}})
        await stream.send_message(cri_pb2.StatusResponse(info={"config": said}))

    def __mapping__(self) -> dict[str, const.Handler]:
        kinds = (cri_pb2.StatusRequest, cri_pb2.StatusResponse)
        return {"/runtime.v1.RuntimeService/Status": const.Handler(self._status, const.Cardinality.UNARY_UNARY, *kinds)}


@pytest.mark.parametrize(("systemd", "wanted"), [(True, "systemd"), (False, "cgroupfs")])
async def test_a_kubelet_has_the_cgroup_driver_of_its_containerd(tmp_path: Path, systemd: bool, wanted: str) -> None:
    """Somebody else's is asked; what ours was told stands in its file."""
    path = str(tmp_path / "theirs" / "theirs.sock")
    settings = settings_at(tmp_path, container_runtime_endpoint=path)
    found, cluster = finding.Found({}, finding.ELSEWHERE), clusters.settings(tmp_path)
    async with rpc_server.serve(unixsocket.listen(path), [Runtime(systemd=systemd)]):
        assert await Server(settings, found, cluster)._cgroup_driver() == wanted
    own = Server(dataclasses.replace(settings, container_runtime_endpoint=""), found, cluster)
    file = Path(settings.layout.containerd_config)
    file.parent.mkdir(parents=True)
    options = "plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc"
    file.write_text(
        f"version = 3\n[{options}]\nruntime_type = 'io.containerd.runc.v2'\noptions.SystemdCgroup = {str(systemd).lower()}\n"
    )
    assert await own._cgroup_driver() == wanted
