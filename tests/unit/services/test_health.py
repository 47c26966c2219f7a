"""Health and metrics over HTTP: answers, and limits for whoever asks."""

import asyncio
import contextlib
import http.client
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.services import health
from nixlet.telemetry import metrics


class State:
    """Checks that a test can make fail."""

    def __init__(self) -> None:
        self.wrong: Exception | None = None
        self.asked = 0
        self.remark = ""
        self.counter = metrics.Counter("things_total", "Things.")
        registry = metrics.Registry()
        registry.add(self.counter)

        async def first() -> None:
            self.asked += 1
            await asyncio.sleep(0.01)

        async def second() -> None:
            if self.wrong is not None:
                raise self.wrong

        self.health = health.Health({"first": first, "second": second}, registry, {"third": lambda: self.remark})


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    made = State()
    async with health.serve(made.health, str(tmp_path / "h.sock")):
        yield made


def exchange(path: Path, request: bytes, *, end: bool = False) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(path))
        with contextlib.suppress(BrokenPipeError):
            sock.sendall(request)
        if end:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while data := sock.recv(65536):
                answer += data
        return answer


async def ask(path: Path, target: str, method: str = "GET") -> tuple[int, str]:
    """Ask with the standard library's client, which is strict about what it gets."""

    def run() -> tuple[int, str]:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(30)
        with contextlib.closing(connection):
            connection.sock.connect(str(path))
            connection.request(method, target)
            response = connection.getresponse()
            return response.status, response.read().decode()

    return await asyncio.to_thread(run)


async def test_a_node_that_is_well(state: State, tmp_path: Path) -> None:
    path = tmp_path / "h.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert await ask(path, "/healthz") == (200, "ok")
    assert await ask(path, "/readyz") == (200, "ok")
    assert await ask(path, "/readyz?verbose") == (200, "[+]first ok\n[+]second ok\nreadyz check passed\n")
    state.remark = "as before:\nline 3"
    assert await ask(path, "/readyz") == (200, "ok")
    said = "[+]first ok\n[+]second ok\n[!]third: as before: line 3\nreadyz check passed\n"
    assert await ask(path, "/readyz?verbose") == (200, said)
    state.counter.add(amount=3)
    status, text = await ask(path, "/metrics")
    assert status == 200
    assert text.splitlines()[-1] == "things_total 3"
    assert await ask(path, "/healthz", "HEAD") == (200, "")
    assert (await ask(path, "/readyz/etc"))[0] == 404
    assert (await ask(path, "/healthz", "POST"))[0] == 405


async def test_what_is_wrong_is_told(state: State, tmp_path: Path) -> None:
    state.wrong = errors.UnavailableError("it is gone:\nreally")
    expected = "[+]first ok\n[-]second failed: it is gone: really\nreadyz check failed\n"
    assert await ask(tmp_path / "h.sock", "/readyz") == (503, expected)
    assert await ask(tmp_path / "h.sock", "/healthz") == (200, "ok")


async def test_a_mistake_in_a_check_is_no_readiness(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state.wrong = KeyError("secret")
    status, text = await ask(tmp_path / "h.sock", "/readyz")
    assert status == 503
    assert "[-]second failed: internal error: KeyError\n" in text
    assert "secret" not in text
    assert "the check second failed" in caplog.text


async def test_those_who_ask_at_the_same_time_share_one_answer(state: State) -> None:
    answers = await asyncio.gather(*(state.health.answer("/readyz") for _ in range(8)))
    assert {answer[0] for answer in answers} == {200}
    assert state.asked == 1
    await state.health.answer("/readyz")
    assert state.asked == 2


async def test_what_went_well_is_believed_for_a_while_and_what_did_not_is_not() -> None:
    outcomes: list[Exception | None] = [errors.UnavailableError("no"), None, errors.UnavailableError("again")]

    async def check() -> None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    for seconds, left in ((60.0, 1), (0.0, 0)):
        checked = health.good_for(seconds, check)
        if left:
            with pytest.raises(errors.UnavailableError):
                await checked()
            for _ in range(3):
                await checked()
        else:
            with pytest.raises(errors.UnavailableError, match="again"):
                await checked()
        assert len(outcomes) == left


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /healthz\r\n\r\n", 400),
        (b"GET http://elsewhere/ HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/2.0\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\r\n\r\n", 400),
        (b"GET /healthz HT", 400),
        (b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20000, 431),
    ],
)
async def test_what_is_no_request(state: State, tmp_path: Path, request_: bytes, status: int) -> None:
    answer = await asyncio.to_thread(exchange, tmp_path / "h.sock", request_, end=True)
    # Whoever is still sending may be cut off before the answer reaches it.
    assert answer.startswith(b"HTTP/1.1 %d " % status) or (status == 431 and not answer)
    assert await ask(tmp_path / "h.sock", "/healthz") == (200, "ok")


async def test_who_says_nothing_is_cut_off(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_TIMEOUT", 0.1)
    answer = await asyncio.to_thread(exchange, tmp_path / "h.sock", b"GET /healthz HTTP/1.1\r\n")
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_who_takes_all_connections_gets_no_more(state: State, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(health._MAX_CONNECTIONS):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            await asyncio.to_thread(sock.connect, str(tmp_path / "h.sock"))
        assert (await asyncio.to_thread(exchange, tmp_path / "h.sock", b"")).startswith(b"HTTP/1.1 503 ")
    async with asyncio.timeout(20):
        # Who is refused may find the connection closed before the request is written: no client that minds that.
        request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        while not (await asyncio.to_thread(exchange, tmp_path / "h.sock", request)).startswith(b"HTTP/1.1 200 "):
            await asyncio.sleep(0.02)


async def test_nothing_stays(tmp_path: Path) -> None:
    path = tmp_path / "h.sock"
    async with health.serve(State().health, str(path)):
        sock = socket.socket(socket.AF_UNIX)
        await asyncio.to_thread(sock.connect, str(path))
        # Accepted in order: when the second has its answer, the first is open.
        assert await ask(path, "/healthz") == (200, "ok")
    assert sock.recv(1) == b""
    sock.close()
    assert os.listdir(tmp_path) == []


async def test_loopback(free_port: Callable[[], int]) -> None:
    port = free_port()
    made = State()
    async with health.serve(made.health, f"127.0.0.1:{port}"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.read()).endswith(b"\r\n\r\nok")
        writer.close()
        with pytest.raises(errors.FailedPreconditionError, match="Address already in use"):
            async with health.serve(made.health, f"127.0.0.1:{port}"):
                pass


@pytest.fixture
def free_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port: int = sock.getsockname()[1]
            return port

    return find


@pytest.mark.parametrize("text", ["127.0.0.1:9763", "[::1]:9763", "127.9.9.9:1", "localhost:9763"])
def test_addresses(text: str) -> None:
    host, port = health.parse_address(text)
    assert port in {9763, 1}
    assert "[" not in host


@pytest.mark.parametrize(
    "text",
    ["", "9763", ":9763", "0.0.0.0:9763", "10.0.0.1:80", "example.org:80", "127.0.0.1:", "127.0.0.1:70000", "::1"],
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(errors.UsageError):
        health.parse_address(text)


async def test_further_checks_are_asked_for_each_time_and_take_no_other_ones_place() -> None:
    async def well() -> None:
        return

    async def wrong() -> None:
        raise errors.UnavailableError("gone")

    further: dict[str, health.Check] = {}
    told = health.Health({"first": wrong}, metrics.Registry(), further=lambda: further)
    assert await told.failures() == {"first": "gone"}
    further |= {"first": well, "later": wrong}
    assert await told.failures() == {"first": "gone", "later": "gone"}
    further["later"] = well
    assert await told.failures() == {"first": "gone", "later": ""}
    further.clear()
    assert await told.failures() == {"first": "gone"}
