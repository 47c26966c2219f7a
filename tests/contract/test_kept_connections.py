"""Connections to the real Nix that are kept: how many processes there are, what is held for how long, and what Nix remembers."""

import asyncio
import http.server
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from nixlet.host import process
from nixlet.store import closures, paths, policy, realiser
from nixlet.store.daemon import client, pool
from support import nixdaemons
from support.nixstore import PrivateStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrivateStore]:
    made = PrivateStore(tmp_path / "nix")
    yield made
    made.remove()


@pytest.fixture
def started(tmp_path: Path, store: PrivateStore) -> nixdaemons.Started:
    (tmp_path / "bin").mkdir()
    return nixdaemons.Started(tmp_path / "bin", store.environment)


@pytest.fixture
def daemon(started: nixdaemons.Started) -> client.DaemonStore:
    return client.DaemonStore(client.DaemonSettings.from_environment(started.environment))


def path(store: PrivateStore, text: str) -> paths.StorePath:
    return paths.parse(text, store.store_dir)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.02)


def closure_of(store: PrivateStore, name: str) -> closures.ClosureReference:
    member = store.text(f"{name}-member", name)
    return closures.ClosureReference(path(store, store.add(name, {"store-paths": f"{member}\n"})))


async def test_one_process_serves_one_user_after_the_other(
    store: PrivateStore,
    started: nixdaemons.Started,
    daemon: client.DaemonStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    references = [closure_of(store, name) for name in ("one", "two", "three")]
    archive = path(store, store.add("archive", "archive"))
    bringer = realiser.Realiser(daemon, policy.Policy())
    async with daemon.keeping():
        # As a pull does it: the archive, then the closures of all layers, and each once more by itself.
        async with bringer.holding([archive]) as held:
            assert held.infos[archive].path == archive
        async with bringer.all_realised(references) as found:
            assert len(found) == 3
            for reference in references:
                async with bringer.realised(reference) as closure:
                    assert closure is found[reference.identity]
        monkeypatch.setattr(pool, "_IDLE", 0.1)
        async with bringer.realised(references[0]):
            pass
        assert len(started.pids) == 1
        # And nothing stays.
        await until(lambda: not started.running)
        async with bringer.realised(references[0]):
            pass
        assert len(started.pids) == 2
    assert not started.running


async def test_one_connection_to_a_socket_serves_one_user_after_the_other(store: PrivateStore, tmp_path: Path) -> None:
    references = [closure_of(store, name) for name in ("one", "two")]
    with nixdaemons.Listening.at(tmp_path / "socket", store.environment) as listening:
        environment = {**store.environment, "NIX_DAEMON_SOCKET_PATH": str(listening.socket)}
        daemon = client.DaemonStore(client.DaemonSettings.from_environment(environment))
        bringer = realiser.Realiser(daemon, policy.Policy())
        async with daemon.keeping():
            for reference in references:
                async with bringer.realised(reference):
                    pass
        assert listening.connections == 1


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_process_that_was_killed_between_two_uses_is_no_trouble(
    store: PrivateStore,
    started: nixdaemons.Started,
    daemon: client.DaemonStore,
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    reference = closure_of(store, "one")

    async def use() -> None:
        bringer = realiser.Realiser(daemon, policy.Policy())
        async with daemon.keeping():
            for number in range(12):
                async with bringer.realised(reference):
                    assert len(started.pids) == number + 1
                os.kill(started.pids[-1], signal.SIGKILL)
                # The next user may come before anything is known of it, when a part of it is, or when all is.
                if number % 4 == 3:
                    await until(lambda: not daemon._pool._idle)
                else:
                    await asyncio.sleep(number % 4 / 1000)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(use())


async def test_what_was_held_is_let_go_with_the_connection(
    store: PrivateStore, daemon: client.DaemonStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_IDLE", 3600.0)
    member = path(store, store.add("member", "member"))
    bringer = realiser.Realiser(daemon, policy.Policy())
    async with daemon.keeping():
        async with bringer.holding([member]):
            pass
        await asyncio.to_thread(store.nix, "nix-store", "--gc")
        assert os.path.exists(member)
    await asyncio.to_thread(store.nix, "nix-store", "--gc")
    assert not os.path.exists(member)


async def test_what_somebody_deleted_behind_nixs_back_is_fetched_again(
    store: PrivateStore, started: nixdaemons.Started, daemon: client.DaemonStore
) -> None:
    """Whatever Nix remembers of it over the connection."""
    reference = closure_of(store, "one")
    info = reference.closure_info
    assert info is not None
    cache = store.directory / "cache"
    with (store.directory / "conf" / "nix.conf").open("a") as conf:
        conf.write(f"substituters = file://{cache}\nrequire-sigs = false\n")
    bringer = realiser.Realiser(daemon, policy.Policy())
    async with daemon.keeping():
        async with bringer.realised(reference) as first:
            pass
        store.nix("nix", "copy", "--to", f"file://{cache}", info)
        subprocess.run(["rm", "-rf", info], check=True)
        store.nix("nix-store", "--verify")
        async with bringer.realised(reference) as again:
            assert again.members == first.members
            assert os.path.exists(info)
    # Some versions of Nix remember, and are asked anew over another connection.
    assert 1 <= len(started.pids) <= 2


async def test_what_somebody_signed_meanwhile_is_taken_for_signed(
    store: PrivateStore, started: nixdaemons.Started, daemon: client.DaemonStore
) -> None:
    """Whatever Nix remembers of it over the connection."""
    [imported] = store.texts({"imported": "imported"})
    key = store.directory / "key"
    async with daemon.keeping():
        async with realiser.Realiser(daemon, policy.Policy()).holding([imported]) as held:
            assert not held.infos[imported].signatures
        store.nix("nix-store", "--generate-binary-cache-key", "test-1", str(key), f"{key}.pub")
        store.nix("nix", "store", "sign", "--key-file", str(key), imported)
        async with realiser.Realiser(daemon, policy.Policy("deny")).holding([imported]) as held:
            assert len(held.infos[imported].signatures) == 1
    # Some versions of Nix remember, and are asked anew over another connection.
    assert 1 <= len(started.pids) <= 2


async def test_many_at_once_of_whom_some_give_up(
    store: PrivateStore, started: nixdaemons.Started, daemon: client.DaemonStore
) -> None:
    """Each gets its own closure, whole, and never another one's answer."""
    chance = random.Random(3)
    references = [closure_of(store, f"image{number}") for number in range(6)]
    members = {
        reference.identity: Path(reference.closure_info or "", "store-paths").read_text().split()
        for reference in references
    }
    bringer = realiser.Realiser(daemon, policy.Policy())
    finished = 0

    async def realise(reference: closures.ClosureReference) -> None:
        nonlocal finished
        async with bringer.realised(reference) as closure:
            assert list(closure.members) == members[reference.identity]
            await asyncio.sleep(chance.random() / 100)
            closure.check_held()
        finished += 1

    async with daemon.keeping():
        for _ in range(12):
            tasks = [asyncio.create_task(realise(chance.choice(references))) for _ in range(8)]
            await asyncio.sleep(chance.random() / 10)
            given_up = chance.sample(tasks, 3)
            for task in given_up:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome
        assert finished >= 12 * 5
        assert len(daemon._pool._idle) <= pool._MOST
        assert not bringer._running
    assert not started.running


PROGRAM = """
import asyncio, os, sys
from nixlet.store import paths
from nixlet.store.daemon import client
async def main():
    store = client.DaemonStore(client.DaemonSettings.from_environment(os.environ))
    async with store.session() as session:
        await session.realise([paths.parse(sys.argv[1], store.store_dir)])
asyncio.run(main())
"""


async def test_a_process_ends_with_us_whatever_it_is_at(tmp_path: Path) -> None:
    """Nobody guards it: it sees that its standard input has ended."""
    asked = threading.Event()
    released = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            released.wait(30)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class calls it so)
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        store = PrivateStore(tmp_path / "nix", substituters=f"http://127.0.0.1:{server.server_address[1]}")
        (tmp_path / "bin").mkdir()
        started = nixdaemons.Started(tmp_path / "bin", store.environment)
        absent = f"{store.store_dir}/{'0' * 32}-absent"
        argv = [sys.executable, "-c", PROGRAM, absent]
        try:
            async with process.start(argv, env=started.environment) as parent:
                await until(asked.is_set)
                assert len(started.running) == 1
                parent.send_signal(signal.SIGKILL)
                await parent.wait()
                await until(lambda: not started.running)
        finally:
            released.set()
            server.shutdown()
            thread.join()
            store.remove()
