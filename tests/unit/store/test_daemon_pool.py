"""Connections that are kept: who gets them, who doesn't, and what a daemon may do meanwhile."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.store import closures, paths, policy, realiser
from nixlet.store.daemon import client, pool, wire
from nixlet.store.daemon import session as session_module
from support.nixpeer import LAST, Peer, Script, daemon, failure

PRESENT = paths.from_name("0" * 32 + "-present")


async def used(store: client.DaemonStore) -> bool:
    """Ask something; whether that was over a connection that was kept."""
    async with store.session() as session:
        assert await session.present([PRESENT]) == {PRESENT}
        return session.reused


async def once(peer: Peer) -> None:
    """A connection with one user."""
    await peer.greet()
    await peer.valid_paths(PRESENT)
    assert await peer.ended()


async def twice(peer: Peer) -> None:
    """A connection with two, one after the other."""
    await peer.greet()
    await peer.valid_paths(PRESENT)
    await peer.asked_for_options()
    peer.send(LAST)
    await peer.valid_paths(PRESENT)
    assert await peer.ended()


async def test_the_next_user_gets_the_same_connection(tmp_path: Path) -> None:
    async with daemon(tmp_path, twice) as store, store.keeping():
        assert [await used(store) for _ in range(2)] == [False, True]


async def test_where_nobody_keeps_them_each_is_closed_after_its_use(tmp_path: Path) -> None:
    async with daemon(tmp_path, once, once, twice, once) as store:
        assert [await used(store) for _ in range(2)] == [False, False]
        async with store.keeping():
            assert [await used(store) for _ in range(2)] == [False, True]
        assert not await used(store)


async def test_a_user_who_is_there_longer_than_the_keeping_ends_it(tmp_path: Path) -> None:
    async with daemon(tmp_path, once) as store, contextlib.AsyncExitStack() as stack:
        async with store.keeping():
            session = await stack.enter_async_context(store.session())
        assert await session.present([PRESENT]) == {PRESENT}


async def test_two_at_once_never_share_one(tmp_path: Path) -> None:
    async with daemon(tmp_path, twice, twice) as store, store.keeping():
        for reused in (False, True):
            async with store.session() as one, store.session() as other:
                assert (one.reused, other.reused) == (reused, reused)
                for session in (one, other):
                    assert await session.present([PRESENT]) == {PRESENT}


async def test_only_a_few_are_kept(tmp_path: Path) -> None:
    async with daemon(tmp_path, once, once, *[twice] * pool._MOST) as store, store.keeping():
        for count, kept in ((pool._MOST + 2, 0), (pool._MOST, pool._MOST)):
            async with contextlib.AsyncExitStack() as stack:
                sessions = [await stack.enter_async_context(store.session()) for _ in range(count)]
                assert sum(session.reused for session in sessions) == kept
                for session in sessions:
                    await session.present([PRESENT])


async def test_nothing_is_kept_for_longer_than_some_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_IDLE", 0.05)
    gone = asyncio.Event()

    async def script(peer: Peer) -> None:
        await once(peer)
        gone.set()

    async with daemon(tmp_path, script, once) as store, store.keeping():
        await used(store)
        async with asyncio.timeout(10):
            await gone.wait()
        assert not await used(store)


async def test_one_that_is_old_is_kept_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_AGE", 0.0)
    async with daemon(tmp_path, once, once) as store, store.keeping():
        assert [await used(store) for _ in range(2)] == [False, False]


async def test_who_wants_a_new_one_gets_it(tmp_path: Path) -> None:
    async with daemon(tmp_path, once, once) as store, store.keeping():
        await used(store)
        async with store.session(anew=True) as session:
            assert not session.reused
            assert await session.present([PRESENT]) == {PRESENT}


async def closes(peer: Peer) -> None:
    pass


async def closes_when_it_is_asked(peer: Peer) -> None:
    await peer.asked_for_options()


async def answers_rubbish(peer: Peer) -> None:
    await peer.asked_for_options()
    peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert await peer.ended()


async def answers_with_an_error(peer: Peer) -> None:
    await peer.asked_for_options()
    peer.send(failure("the database is busy"))
    assert await peer.ended()


async def does_not_answer(peer: Peer) -> None:
    await peer.asked_for_options()
    assert await peer.ended()


@pytest.mark.parametrize(
    "then", [closes, closes_when_it_is_asked, answers_rubbish, answers_with_an_error, does_not_answer]
)
async def test_one_that_is_no_good_any_more_is_no_trouble_for_its_next_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: Script
) -> None:
    monkeypatch.setattr(pool, "_ANSWER", 0.1)

    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.valid_paths(PRESENT)
        await then(peer)

    async with daemon(tmp_path, script, twice) as store, store.keeping():
        assert [await used(store) for _ in range(3)] == [False, False, True]


async def says_something(peer: Peer) -> None:
    peer.send(LAST)
    assert await peer.ended()


@pytest.mark.parametrize("then", [closes, says_something])
async def test_one_whose_daemon_ends_or_says_something_unasked_is_given_up_at_once(
    tmp_path: Path, then: Script
) -> None:
    unused = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.valid_paths(PRESENT)
        await unused.wait()
        await then(peer)

    async with daemon(tmp_path, script, once) as store, store.keeping():
        await used(store)
        assert len(store._pool._idle) == 1
        unused.set()
        async with asyncio.timeout(10):
            while store._pool._idle:
                await asyncio.sleep(0.01)
        assert not await used(store)


async def test_one_whose_daemon_says_more_than_it_was_asked_is_not_kept(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        assert (await peer.integer(), await peer.strings(), await peer.integer()) == (31, [PRESENT], 0)
        peer.send(LAST, wire.strings([PRESENT]), LAST)
        assert await peer.ended()

    async with daemon(tmp_path, script, once) as store, store.keeping():
        assert [await used(store) for _ in range(2)] == [False, False]


@pytest.mark.parametrize("turns", range(5))
@pytest.mark.parametrize("rested", [False, True])
async def test_what_came_late_is_not_the_next_users_answer(tmp_path: Path, turns: int, rested: bool) -> None:
    """Wherever it is by then: with the kernel, with the event loop, or found by who watches a kept connection."""
    unused, late = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.valid_paths(PRESENT)
        await unused.wait()
        os.write(peer.writer.get_extra_info("socket").fileno(), LAST)
        late.set()
        assert await peer.ended()

    async def comes_late() -> None:
        unused.set()
        await late.wait()
        for _ in range(turns):
            await asyncio.sleep(0)

    async with daemon(tmp_path, script, once) as store, store.keeping(), asyncio.timeout(10):
        async with store.session() as session:
            assert await session.present([PRESENT]) == {PRESENT}
            if not rested:
                await comes_late()
        if rested:
            await asyncio.sleep(0.01)
            await comes_late()
        assert not await used(store)


async def test_who_leaves_one_waits_for_no_daemon_that_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for where none is kept: then nobody else would."""
    monkeypatch.setattr(pool, "_AGE", 0.0)
    ended = asyncio.Event()
    left: list[str] = []

    async with daemon(tmp_path, once, once, once) as store:

        async def opened(stack: contextlib.AsyncExitStack) -> session_module.DaemonSession:
            stack.push_async_callback(ended.wait)
            if left == ["failed", "well"]:
                raise errors.UnavailableError("the Nix daemon does not answer")
            return await store._open(stack)

        own = pool.Pool(opened)

        async def fails() -> None:
            with contextlib.suppress(errors.NotFoundError):
                async with own.session(anew=True) as session:
                    await session.present([PRESENT])
                    raise errors.NotFoundError("it is not there")
            left.append("failed")

        async def keeps() -> None:
            async with own.keeping():
                await fails()
                async with own.session(anew=True) as session:
                    await session.present([PRESENT])
                left.append("well")
                with contextlib.suppress(errors.UnavailableError):
                    async with own.session(anew=True):
                        pass
                left.append("not opened")

        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            try:
                keeping = group.create_task(keeps())
                while "not opened" not in left:
                    await asyncio.sleep(0.01)
                failing = group.create_task(fails())
                await asyncio.wait([keeping, failing], timeout=0.05)
                assert not keeping.done()
                assert not failing.done()
            finally:
                ended.set()
        assert left == ["failed", "well", "not opened", "failed"]


async def test_one_whose_user_gave_up_in_the_middle_is_used_by_nobody(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        assert await peer.integer() == 31
        asked.set()
        await peer.ended()

    async with daemon(tmp_path, script, once) as store, store.keeping():
        using = asyncio.create_task(used(store))
        await asked.wait()
        using.cancel()
        await asyncio.wait([using])
        assert using.cancelled()
        assert not await used(store)


async def test_one_whose_user_failed_is_used_by_nobody(tmp_path: Path) -> None:
    """The daemon remembers what it didn't find, in a cache for example, for as long as the connection lasts."""

    async def script(peer: Peer) -> None:
        await peer.greet()
        assert (await peer.integer(), await peer.strings(), await peer.integer()) == (31, [PRESENT], 0)
        peer.send(failure("the database is busy"))
        assert await peer.ended()

    async with daemon(tmp_path, script, once) as store, store.keeping():
        with pytest.raises(errors.NixletError, match="the database is busy"):
            await used(store)
        assert not await used(store)


async def test_one_whose_user_gave_up_while_it_was_being_looked_at_is_closed(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.valid_paths(PRESENT)
        await peer.asked_for_options()
        asked.set()
        assert await peer.ended()

    async with daemon(tmp_path, script, once) as store, store.keeping():
        await used(store)
        using = asyncio.create_task(used(store))
        await asked.wait()
        using.cancel()
        await asyncio.wait([using])
        assert not await used(store)


async def held(peer: Peer, path: str) -> None:
    """A path that is there is realised."""
    assert (await peer.integer(), await peer.string()) == (11, path)
    peer.send(LAST, wire.integer(1))
    assert await peer.valid_paths(path) == [path]


async def told(peer: Peer, path: str, *signatures: str) -> None:
    """What is known of a path without references."""
    assert (await peer.integer(), await peer.string()) == (26, path)
    texts = wire.string("") + wire.string("0" * 64) + wire.strings([])
    peer.send(LAST, wire.integer(1), texts, wire.integer(0), wire.integer(0), wire.integer(0))
    peer.send(wire.strings(signatures), wire.string(""))


async def test_what_a_kept_one_says_against_the_disk_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon remembers over one connection what it told: that isn't so any more when somebody deleted it by force."""
    disk = tmp_path / "store"
    disk.mkdir()

    async def first(peer: Peer) -> None:
        await once_used(peer)
        await peer.asked_for_options()
        peer.send(LAST)
        await held(peer, PRESENT)
        assert await peer.ended()

    async def once_used(peer: Peer) -> None:
        await peer.greet()
        await peer.valid_paths(PRESENT)

    async def second(peer: Peer) -> None:
        await peer.greet()
        (disk / PRESENT.name).touch()  # fetched
        await held(peer, PRESENT)
        await told(peer, PRESENT)
        assert await peer.ended()

    async with daemon(tmp_path, first, second) as store, store.keeping():
        monkeypatch.setattr(client.DaemonStore, "real_dir", str(disk))
        await used(store)
        bringer = realiser.Realiser(store, policy.Policy())
        async with bringer.realised(closures.ClosureReference(None, (PRESENT,))) as closure:
            assert closure.members == (PRESENT,)
            closure.check_held()


async def cannot_be_fetched(peer: Peer) -> None:
    assert (await peer.integer(), await peer.string()) == (11, PRESENT)
    peer.send(LAST, wire.integer(1))
    await peer.valid_paths()
    assert (await peer.integer(), await peer.strings()) == (40, [PRESENT])
    peer.send(failure("no plan"))
    assert (await peer.integer(), await peer.strings(), await peer.integer()) == (46, [PRESENT], 0)
    peer.send(failure("no substituter has it"))
    await peer.valid_paths()


async def is_not_there(peer: Peer) -> None:
    assert (await peer.integer(), await peer.string()) == (11, PRESENT)
    peer.send(LAST, wire.integer(1))
    await peer.valid_paths()


@pytest.mark.parametrize(("says", "fetch"), [(cannot_be_fetched, True), (is_not_there, False)])
async def test_what_a_kept_one_did_not_find_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: Script, fetch: bool
) -> None:
    """Once: a daemon remembers it for the connection, and for no other one."""
    disk = tmp_path / "store"
    disk.mkdir()
    (disk / PRESENT.name).touch()

    async def remembers(peer: Peer) -> None:
        await peer.greet()
        await peer.valid_paths(PRESENT)
        await peer.asked_for_options()
        peer.send(LAST)
        await says(peer)
        assert await peer.ended()

    async def has_it(peer: Peer) -> None:
        await peer.greet()
        await held(peer, PRESENT)
        await told(peer, PRESENT)
        assert await peer.ended()

    async def has_it_not(peer: Peer) -> None:
        await peer.greet()
        await says(peer)
        assert await peer.ended()

    monkeypatch.setattr(client.DaemonStore, "real_dir", str(disk))
    reference = closures.ClosureReference(None, (PRESENT,))
    async with daemon(tmp_path, remembers, has_it, has_it_not) as store:
        bringer = realiser.Realiser(store, policy.Policy())
        async with store.keeping():
            await used(store)
            async with bringer.realised(reference, fetch=fetch) as closure:
                assert closure.members == (PRESENT,)
        with pytest.raises((errors.NotFoundError, errors.FailedPreconditionError), match="not in the Nix store"):
            async with bringer.realised(reference, fetch=fetch):
                pass


async def test_what_a_policy_refuses_by_what_a_kept_one_remembers_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a path that has been signed since then."""
    disk = tmp_path / "store"
    disk.mkdir()
    (disk / PRESENT.name).touch()

    async def remembers(peer: Peer) -> None:
        await peer.greet()
        await peer.valid_paths(PRESENT)
        await peer.asked_for_options()
        peer.send(LAST)
        await held(peer, PRESENT)
        await told(peer, PRESENT)
        assert await peer.ended()

    async def knows(peer: Peer) -> None:
        await peer.greet()
        await held(peer, PRESENT)
        await told(peer, PRESENT, "key:signature")
        assert await peer.ended()

    monkeypatch.setattr(client.DaemonStore, "real_dir", str(disk))
    async with daemon(tmp_path, remembers, knows) as store, store.keeping():
        await used(store)
        async with realiser.Realiser(store, policy.Policy("deny")).holding([PRESENT]) as found:
            assert found.infos[PRESENT].signatures == {"key:signature"}


async def test_a_closure_whose_connection_broke_is_not_taken_for_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "store"
    disk.mkdir()
    (disk / PRESENT.name).touch()
    dies = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        await held(peer, PRESENT)
        await told(peer, PRESENT)
        await dies.wait()

    async with daemon(tmp_path, script, once) as store, store.keeping():
        monkeypatch.setattr(client.DaemonStore, "real_dir", str(disk))
        bringer = realiser.Realiser(store, policy.Policy())
        async with bringer.realised(closures.ClosureReference(None, (PRESENT,))) as closure:
            closure.check_held()
            dies.set()
            async with asyncio.timeout(10):
                while closure.session.alive:
                    await asyncio.sleep(0.01)
            with pytest.raises(errors.UnavailableError, match="the Nix daemon ended before"):
                closure.check_held()
        assert not await used(store)
