"""A node that ends: for what, in what order, and what it says."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nixlet import errors
from nixlet.host import children, mounts, supervisor
from nixlet.node.children import containerd_child
from nixlet.node.lifecycle import server
from nixlet.node.ownership import marker
from nixlet.node.requirements import preflight, snapshotters
from nixlet.node.settings import config


@contextlib.asynccontextmanager
async def interrupted(fails: Callable[[], None], *, start: bool) -> AsyncIterator[mock.Mock]:
    """A node that a signal reaches while its children take their time to end."""
    try:
        async with server._told(fails):
            if start:
                raise errors.UnavailableError("disk broken")
            node = mock.Mock()
            node.gave_up = mock.AsyncMock(return_value=errors.UnavailableError("disk broken"))
            yield node
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(1)


@pytest.mark.parametrize("start", [False, True])
async def test_a_signal_during_the_end_for_an_error_does_not_hide_the_error(
    monkeypatch: pytest.MonkeyPatch, start: bool
) -> None:
    monkeypatch.setattr(server, "running", lambda *_, fails, **__: interrupted(fails, start=start))
    with pytest.raises(errors.UnavailableError, match="disk broken"):
        await server.run(config.Settings())


async def test_a_signal_ends_a_node_that_has_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    @contextlib.asynccontextmanager
    async def running(*_: Any, fails: Callable[[], None], **__: Any) -> AsyncIterator[mock.Mock]:
        async with server._told(fails):
            try:
                node = mock.Mock()
                node.gave_up = asyncio.Event().wait
                asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
                yield node
            finally:
                await asyncio.sleep(0.1)
                ended.append("node")

    monkeypatch.setattr(server, "running", running)
    await asyncio.wait_for(server.run(config.Settings()), 30)
    assert ended == ["node"]


def stand_in(monkeypatch: pytest.MonkeyPatch, **parts: Any) -> None:
    """A node without what it asks of the machine, and with other parts of ``server``."""
    for name, instead in {"_claim": mock.Mock(), "_store": mock.Mock(return_value=None), **parts}.items():
        monkeypatch.setattr(server, name, instead)
    monkeypatch.setattr(preflight, "check_root", mock.Mock())
    monkeypatch.setattr(marker, "check", mock.Mock())
    monkeypatch.setattr(mounts, "powerless", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(snapshotters, "check_supported", mock.AsyncMock())
    monkeypatch.setattr(containerd_child, "find_programs", mock.AsyncMock())


@pytest.mark.parametrize("fails", ["serve", "attend", ""])
async def test_what_serves_children_goes_after_them_wherever_a_start_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    events = tmp_path / "events"

    def happens(what: str) -> None:
        with events.open("a") as file:
            file.write(f"{what}\n")

    async def up() -> None:
        while not (tmp_path / "up").exists():
            await asyncio.sleep(0.01)

    async def start(needed: contextlib.AsyncExitStack, kept: children.Children, *_: object) -> mock.Mock:
        needed.callback(happens, "what it needs goes")
        script = f"trap 'echo child ends >> {events}; exit' TERM; touch {tmp_path}/up; while :; do sleep 0.02; done"
        kept.start(
            supervisor.Program(
                name="containerd",
                argv=["sh", "-c", script],
                env=dict(os.environ),
                log_path=str(tmp_path / "log"),
                ready=up,
                ready_timeout=30,
            )
        )
        await kept.ready()
        return mock.Mock()

    class Made:
        def __init__(self, *_: object) -> None:
            self.answered = mock.AsyncMock()

        async def serve(self, stack: contextlib.AsyncExitStack, _: object) -> None:
            stack.callback(happens, "services go")
            if fails == "serve":
                raise errors.UnavailableError("broken")

        @contextlib.asynccontextmanager
        async def with_own(self, *_: object, **__: object) -> AsyncIterator[None]:
            yield

        async def attend(self, stack: contextlib.AsyncExitStack, *_: object) -> None:
            stack.callback(happens, "looking after it ends")
            if fails == "attend":
                raise errors.UnavailableError("broken")

    stand_in(monkeypatch, _start=start, _assembly=lambda: Made)
    settings = config.Settings(data_dir=str(tmp_path / "data"), state_dir=str(tmp_path / "state"))
    with pytest.raises(errors.UnavailableError, match="broken") if fails else contextlib.nullcontext():
        async with server.running(settings):
            pass
    looked = [] if fails == "serve" else ["looking after it ends"]
    assert events.read_text().splitlines() == [*looked, "child ends", "services go", "what it needs goes"]


@pytest.mark.parametrize("fails", ["cluster", "containerd"])
async def test_what_fails_first_of_a_cluster_and_its_containerd_ends_the_start_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    entered, ended = asyncio.Event(), []

    @contextlib.contextmanager
    def going(what: str) -> Iterator[None]:
        try:
            yield
        finally:
            ended.append(what)

    class Cluster:
        settings = config.Settings(data_dir=str(tmp_path / "data"), state_dir=str(tmp_path / "state"))
        routed_mtu = 0

        async def begin(self, *_: object) -> None:
            with going("cluster"):
                await entered.wait()
                if fails == "cluster":
                    raise errors.UnavailableError("broken") from OSError("port taken")
                await asyncio.Event().wait()

    class Made:
        def __init__(self, *_: object) -> None:
            self.answered = mock.AsyncMock()
            self.serve = mock.AsyncMock()

        @contextlib.asynccontextmanager
        async def with_own(self, *_: object, **__: object) -> AsyncIterator[None]:
            with going("containerd"):
                entered.set()
                await asyncio.sleep(0)
                if fails == "containerd":
                    raise errors.UnavailableError("broken") from OSError("port taken")
                await asyncio.Event().wait()
            yield

    stand_in(
        monkeypatch,
        _start=mock.AsyncMock(),
        _assembly=lambda: Made,
        _cluster=mock.AsyncMock(return_value=Cluster()),
    )
    with pytest.raises(errors.UnavailableError, match="broken") as caught:
        async with asyncio.timeout(30), server.running(Cluster.settings):
            pass
    assert isinstance(caught.value.__cause__, OSError)
    assert not isinstance(caught.value.__context__, BaseExceptionGroup)
    assert sorted(ended) == ["cluster", "containerd"]
