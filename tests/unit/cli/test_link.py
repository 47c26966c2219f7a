"""How verbs ask a node: who runs none, and who is waited for."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.cli import link
from nixlet.host import unixsocket
from nixlet.services import nodeaddress
from nixlet.varlink import server

DESCRIPTION = f"""interface {nodeaddress.INTERFACE}
method Late() -> (text: string)
method GetSilent() -> (programs: []string)
"""


class Service:
    """Answers ``Late`` when it was asked who is silent, or at once."""

    def __init__(self) -> None:
        self.asked = 0
        self.let_go = asyncio.Event()
        self.silent = ["containerd at /there"]

    async def late(self, _: server.Call[server.Nothing]) -> Mapping[str, object]:
        await self.let_go.wait()
        return {"text": "late"}

    async def get_silent(self, _: server.Call[server.Nothing]) -> Mapping[str, object]:
        self.asked += 1
        self.let_go.set()
        return {"programs": self.silent}


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def state_dir(tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    monkeypatch.setattr(link, "PATIENCE", 0.05)
    methods = {
        "Late": server.Method(server.Nothing, service.late),
        "GetSilent": server.Method(server.Nothing, service.get_silent),
    }
    listening = unixsocket.listen(str(tmp_path / nodeaddress.SOCKET))
    async with server.serve(listening, [server.Interface(nodeaddress.INTERFACE, DESCRIPTION, methods)]):
        yield str(tmp_path)


async def called_twice(state_dir: str) -> list[str]:
    def call() -> list[str]:
        with link.connected(state_dir) as node:
            return [node.call("Late")["text"] for _ in range(2)]

    return await asyncio.wait_for(asyncio.to_thread(call), 20)


async def test_who_is_silent_is_told_once(state_dir: str, service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert await called_twice(state_dir) == ["late", "late"]
    assert capsys.readouterr().err == "waiting for containerd at /there, which does not answer\n"
    assert service.asked == 1


async def test_nobody_is_named_when_all_answer(
    state_dir: str, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.silent = []
    assert await called_twice(state_dir) == ["late", "late"]
    assert (capsys.readouterr().err, service.asked) == ("", 1)


async def test_nobody_is_asked_when_the_answer_comes(state_dir: str, service: Service) -> None:
    service.let_go.set()
    assert await called_twice(state_dir) == ["late", "late"]
    assert service.asked == 0


def test_a_node_that_stands_still_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(link, "_ANSWER", 0.05)
    with unixsocket.listen(str(tmp_path / nodeaddress.SOCKET)), link.connected(str(tmp_path)) as node:
        node.tell_who_is_silent()
    expected = f"waiting for the node at {tmp_path}/{nodeaddress.SOCKET}, which does not answer\n"
    assert capsys.readouterr().err == expected


def test_no_node(tmp_path: Path) -> None:
    with pytest.raises(errors.UnavailableError, match=f"^no node runs at {tmp_path}$") as raised:
        link.connected(str(tmp_path))
    assert "--state-dir" in raised.value.hint
