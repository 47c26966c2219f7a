"""A cluster's start beside its node: what ends it."""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nixlet import errors
from nixlet.host import children, supervisor
from nixlet.kubeclient import endpoint
from nixlet.node.cluster import bootstrap, finding, running
from nixlet.node.settings import config
from nixlet.services import joining, joinserver
from support import clusters


async def at_once() -> None:
    return


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

    async def apply(_: object) -> None:
        dies.set()
        if slow == "bootstrap":
            await never.wait()
        else:
            # It is ready in the very moment in which the other one is given up.
            await kept.gave_up()

    monkeypatch.setattr(bootstrap, "apply", apply)
    settings = config.Settings(data_dir=str(tmp_path / "data"), disable_agent=True)
    cluster = running.Cluster(
        settings,
        config.Layout(settings.data_dir, str(tmp_path / "state")),
        finding.Found({"kube-apiserver": "/bin/true"}, finding.ELSEWHERE),
        clusters.settings(tmp_path),
    )
    monkeypatch.setattr(running, "AsyncClient", mock.Mock(return_value=contextlib.nullcontext()))
    monkeypatch.setattr(running, "Client", mock.Mock())
    monkeypatch.setattr(joining, "Doorkeeper", mock.Mock())
    monkeypatch.setattr(joinserver, "serve", mock.Mock(return_value=contextlib.nullcontext()))
    monkeypatch.setattr(endpoint.Endpoint, "of_kubeconfig", mock.Mock())
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
