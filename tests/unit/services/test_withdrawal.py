"""Calls that are withdrawn while they are answered, over the real protocol."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import msgspec
import pytest

from nixlet import errors
from nixlet.host import unixsocket
from nixlet.services import pullprogress, withdrawal
from nixlet.telemetry import progress
from nixlet.varlink import client, server


class Ticket(msgspec.Struct):
    ticket: str = ""


class Service:
    """Has a method that goes on until it is withdrawn, and one that pulls."""

    def __init__(self) -> None:
        self.withdrawals = withdrawal.Withdrawals()
        self.working = asyncio.Event()
        self.withdrawn = 0

    async def work(self, call: server.Call[Ticket]) -> Mapping[str, object]:
        with self.withdrawals.possible(call, call.parameters.ticket) as withdrawn:
            self.working.set()
            await withdrawn.wait()
            self.withdrawn += 1
            raise errors.CallCancelledError("it is not wanted any more")

    async def pull(self, call: server.Call[server.Nothing]) -> Mapping[str, object]:
        async with pullprogress.told(call) as tell:
            tell("one", None)
            await asyncio.sleep(0)
            for number in range(1000):
                tell("one", progress.Progress("loading", number, 1000, "layers"))
        return {"pulled": True}


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    made = Service()
    methods = {
        "Work": server.Method(Ticket, made.work),
        "Pull": server.Method(server.Nothing, made.pull),
        **made.withdrawals.methods(),
    }
    interface = server.Interface("org.example.Test", "interface org.example.Test\n", methods)
    async with server.serve(unixsocket.listen(str(tmp_path / "s")), [interface]):
        yield made


def connected(directory: Path) -> client.Connection:
    return client.Connection(str(directory / "s"), peer="the service")


async def test_a_call_that_is_withdrawn_is_answered(service: Service, tmp_path: Path) -> None:
    with connected(tmp_path) as first, connected(tmp_path) as second:
        first.send("org.example.Test.Work", {"ticket": "mine"})
        await service.working.wait()
        for ticket in ("another", "mine"):
            await asyncio.to_thread(second.call, "org.example.Test.Withdraw", {"ticket": ticket})
        with pytest.raises(errors.CallCancelledError, match="it is not wanted any more"):
            await asyncio.to_thread(first.receive)
    assert service.withdrawn == 1
    # Nothing is kept of it.
    assert not service.withdrawals._calls


async def test_a_ticket_is_one_calls(service: Service, tmp_path: Path) -> None:
    with connected(tmp_path) as first, connected(tmp_path) as second:
        first.send("org.example.Test.Work", {"ticket": "mine"})
        await service.working.wait()
        with pytest.raises(errors.AlreadyExistsError, match="another call that goes on has this ticket"):
            await asyncio.to_thread(second.call, "org.example.Test.Work", {"ticket": "mine"})
        # The first one still has it.
        await asyncio.to_thread(second.call, "org.example.Test.Withdraw", {"ticket": "mine"})
        with pytest.raises(errors.CallCancelledError):
            await asyncio.to_thread(first.receive)
    assert (service.withdrawn, service.withdrawals._calls) == (1, {})


async def test_a_client_that_goes_withdraws_its_call(service: Service, tmp_path: Path) -> None:
    with connected(tmp_path) as connection:
        connection.send("org.example.Test.Work")
        await service.working.wait()
    async with asyncio.timeout(10):
        while not service.withdrawn:
            await asyncio.sleep(0.01)


async def test_a_pull_tells_its_latest_step_and_holds_nothing_up(service: Service, tmp_path: Path) -> None:
    def pull() -> list[client.Reply]:
        with connected(tmp_path) as connection:
            return list(connection.stream("org.example.Test.Pull"))

    first, last, result = await asyncio.to_thread(pull)
    assert first == {"progress": {"image": "one"}}
    latest = {"image": "one", "stage": "loading", "done": 999, "total": 1000, "unit": "layers", "detail": ""}
    assert last == {"progress": latest}
    assert result == {"pulled": True}


async def test_who_takes_one_reply_gets_no_steps(service: Service, tmp_path: Path) -> None:
    del service
    with connected(tmp_path) as connection:
        assert await asyncio.to_thread(connection.call, "org.example.Test.Pull") == {"pulled": True}


class Process:
    """Gets signals."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    async def send_signal(self, number: int) -> None:
        self.signals.append(number)

    async def resize(self, columns: int, rows: int) -> None:
        raise AssertionError(f"nobody asks for {columns} by {rows}")


async def test_a_signal_is_for_the_process_that_has_started_meanwhile(tmp_path: Path) -> None:
    """What it prints is seen before its client hears that it has started."""
    process, begun, go_on = Process(), asyncio.Event(), asyncio.Event()
    withdrawals = withdrawal.Withdrawals()

    async def work(call: server.Call[Ticket]) -> Mapping[str, object]:
        with withdrawals.possible(call, call.parameters.ticket) as withdrawn:
            begun.set()
            await go_on.wait()
            assert withdrawn.is_set()
            await withdrawn.hand_over(process)
            assert not withdrawn.is_set()
            await withdrawn.wait()
            assert process.signals == [2, 15]
            return {}

    interface = server.Interface(
        "org.example.Test",
        "interface org.example.Test\n",
        {"Work": server.Method(Ticket, work), **withdrawals.methods()},
    )
    async with server.serve(unixsocket.listen(str(tmp_path / "s")), [interface]):
        with connected(tmp_path) as first, connected(tmp_path) as second:
            answer = asyncio.create_task(asyncio.to_thread(first.call, "org.example.Test.Work", {"ticket": "mine"}))
            await begun.wait()

            async def withdraw(**more: int) -> None:
                await asyncio.to_thread(second.call, "org.example.Test.Withdraw", {"ticket": "mine", **more})

            await withdraw(signal=2)
            go_on.set()
            while process.signals != [2]:
                await asyncio.sleep(0.01)
            await withdraw(signal=15)
            while process.signals != [2, 15]:
                await asyncio.sleep(0.01)
            await withdraw()
            assert await answer == {}
