"""The client of the Nix daemon against the real Nix, over its socket and over the standard streams of a child."""

import asyncio
import contextlib
import dataclasses
import functools
import http.server
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.store import closures, interface, paths, policy, realiser, roots
from nixlet.store.daemon import client
from nixlet.store.daemon import session as session_module
from nixlet.telemetry import progress
from support.nixstore import PrivateStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrivateStore]:
    made = PrivateStore(tmp_path / "nix")
    yield made
    made.remove()


@pytest.fixture(params=["socket", "stdio"])
def daemon(request: pytest.FixtureRequest, store: PrivateStore) -> Iterator[client.DaemonStore]:
    if request.param == "stdio":
        yield client.DaemonStore(store.settings)
    else:
        with store.daemon() as settings:
            yield client.DaemonStore(settings)


def path(store: PrivateStore, text: str) -> paths.StorePath:
    return paths.parse(text, store.store_dir)


async def test_presence_of_many_paths_is_one_request(store: PrivateStore, daemon: client.DaemonStore) -> None:
    async with daemon.session() as session:
        added = [await session.add_text(f"file-{number}", f"content {number}") for number in range(200)]
        absent = path(store, f"{store.store_dir}/{'0' * 32}-absent")
        before = session.requests
        assert await session.present([*added, absent]) == set(added)
        assert session.requests == before + 1
    assert Path(added[7]).read_text() == "content 7"


async def test_the_closure_follows_references(store: PrivateStore, daemon: client.DaemonStore) -> None:
    async with daemon.session() as session:
        bottom = await session.add_text("bottom", "bottom")
        middle = await session.add_text("middle", f"needs {bottom}", [bottom])
        top = await session.add_text("top", f"needs {middle}", [middle])
        other = await session.add_text("other", "other")
        infos = await session.closure([top])
        assert infos.keys() == {top, middle, bottom}
        assert infos[top].references == {middle}
        assert interface.top_paths(infos) == (top,)
        assert set(interface.top_paths(infos | await session.closure([other]))) == {top, other}
        with pytest.raises(errors.NotFoundError, match="absent is not in the Nix store"):
            await session.path_infos([path(store, f"{store.store_dir}/{'0' * 32}-absent")])
        # The connection is as good as before.
        assert await session.present([top]) == {top}


async def test_a_nar_is_added_under_the_name_that_its_content_gives(
    store: PrivateStore, daemon: client.DaemonStore
) -> None:
    expected = store.add("tree", {"a": "1", "b": "2"})
    nar = Path(store.directory / "tree.nar")
    nar.write_bytes(_dump(store, expected))
    store.nix("nix-store", "--delete", expected)
    async with daemon.session() as session:
        assert await session.add_nar("tree", nar.read_bytes(), []) == expected
    assert (Path(expected) / "b").read_text() == "2"


def _dump(store: PrivateStore, target: str) -> bytes:
    import subprocess

    return subprocess.run(
        ["nix-store", "--dump", target], env=store.environment, capture_output=True, check=True
    ).stdout


async def test_a_path_that_nobody_has_is_named_with_the_reason(store: PrivateStore, daemon: client.DaemonStore) -> None:
    absent = path(store, f"{store.store_dir}/{'0' * 32}-absent")
    async with daemon.session() as session:
        present = await session.add_text("present", "x")
        with pytest.raises(
            errors.NotFoundError, match=f"{absent} is not in the Nix store and can't be fetched"
        ) as caught:
            await session.realise([present, absent])
        assert "\x1b" not in caught.value.message
        assert str(absent) in caught.value.hint
        assert await session.present([present]) == {present}


async def test_held_paths_survive_a_collection_and_others_do_not(
    store: PrivateStore, daemon: client.DaemonStore
) -> None:
    async with daemon.session() as session:
        held = await session.add_text("held", "held")
        await session.hold([held])
        loose = store.add("loose", "loose")
        await asyncio.to_thread(store.nix, "nix-store", "--gc")
        assert os.path.exists(held)
        assert not os.path.exists(loose)
    await asyncio.to_thread(store.nix, "nix-store", "--gc")
    assert not os.path.exists(held)


async def test_roots_protect_a_closure_after_the_connection(store: PrivateStore, daemon: client.DaemonStore) -> None:
    gc_roots = roots.Roots(daemon.settings.gcroots, "test")
    bringer = realiser.Realiser(daemon, gc_roots, policy.Policy())
    async with daemon.session() as session:
        bottom = await session.add_text("bottom", "bottom")
        top = await session.add_text("top", f"needs {bottom}", [bottom])
        reference = closures.ClosureReference(None, (bottom, top))
        realised = await bringer.realise_closure(reference, root_name="layer")
    assert realised.paths == tuple(sorted([bottom, top]))
    assert realised.took == interface.Realised()
    # One root is enough for both, since one refers to the other.
    assert gc_roots.paths("layer") == [top.name]
    await asyncio.to_thread(store.nix, "nix-store", "--gc")
    assert os.path.exists(bottom)
    gc_roots.remove("layer")
    await asyncio.to_thread(store.nix, "nix-store", "--gc")
    assert not os.path.exists(top)
    assert not os.path.exists(os.path.join(daemon.settings.gcroots, "nixlet"))


async def test_the_closure_form_reads_the_list_of_the_closure_info(
    store: PrivateStore, daemon: client.DaemonStore
) -> None:
    member = store.add("member", "member")
    info = store.add("closure-info", {"store-paths": f"{member}\n"})
    gc_roots = roots.Roots(daemon.settings.gcroots, "test")
    bringer = realiser.Realiser(daemon, gc_roots, policy.Policy())
    realised = await bringer.realise_closure(closures.ClosureReference(path(store, info)), root_name="layer")
    assert realised.paths == (member,)
    # A hand-made closureInfo refers to nothing, so its members need roots of their own.
    assert set(gc_roots.paths("layer")) == {os.path.basename(info), os.path.basename(member)}


@pytest.mark.parametrize("content", ["/etc/passwd\n", "../../etc\n", "--help\n", ""])
async def test_a_closure_info_that_lists_something_else_is_refused(store: PrivateStore, content: str) -> None:
    info = store.add("closure-info", {"store-paths": content} if content else {"other": "x"})
    daemon = client.DaemonStore(store.settings)
    bringer = realiser.Realiser(daemon, roots.Roots(daemon.settings.gcroots, "test"), policy.Policy())
    with pytest.raises(errors.InvalidArgumentError, match=r"is not a store path|has no file store-paths"):
        await bringer.realise_closure(closures.ClosureReference(path(store, info)))


async def test_a_policy_refuses_unsigned_paths(store: PrivateStore) -> None:
    daemon = client.DaemonStore(store.settings)
    strict = realiser.Realiser(daemon, roots.Roots(daemon.settings.gcroots, "t"), policy.Policy("deny"))
    async with daemon.session() as session:
        addressed = await session.add_text("text", "content-addressed")
        await strict.realise_closure(closures.ClosureReference(None, (addressed,)))
    info = interface.PathInfo(addressed, "", "", frozenset(), 0, 0)
    with pytest.raises(errors.PermissionDeniedError, match="is unsigned"):
        policy.Policy("deny").check([info])


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[tuple[Path, PrivateStore]]:
    origin = PrivateStore(tmp_path / "origin")
    yield tmp_path / "cache", origin
    origin.remove()


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        wbufsize = -1

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    handler = functools.partial(Handler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("kind", ["file", "http"])
async def test_a_closure_is_fetched_from_a_cache(kind: str, tmp_path: Path, cache: tuple[Path, PrivateStore]) -> None:
    directory, origin = cache
    # The paths' names depend on the store's directory: both stores have the same one, one after the other.
    async with client.DaemonStore(origin.settings).session() as session:
        wanted = [await session.add_text(f"file-{number}", f"{number}" * 1000) for number in range(20)]
    origin.nix("nix", "copy", "--to", f"file://{directory}", *wanted)
    origin.remove()
    with contextlib.ExitStack() as stack:
        url = f"file://{directory}" if kind == "file" else stack.enter_context(serving(directory))
        consumer = PrivateStore(origin.directory, substituters=url)
        steps: list[progress.Progress] = []
        async with client.DaemonStore(consumer.settings).session() as session:
            took = await session.realise(wanted, steps.append)
            assert await session.present(wanted) == set(wanted)
            again = await session.realise(wanted)
    assert took.fetched_paths == 20
    assert took.fetched_bytes > 0
    assert steps[-1] == progress.Progress("realising", 20, 20, "paths")
    assert again == interface.Realised()


async def test_waiters_share_one_task_and_one_of_them_may_leave(store: PrivateStore) -> None:
    opened = 0

    class Counting(client.DaemonStore):
        @contextlib.asynccontextmanager
        async def session(self) -> AsyncIterator[session_module.DaemonSession]:
            nonlocal opened
            opened += 1
            async with super().session() as session:
                yield session

    daemon = Counting(store.settings)
    member = path(store, store.add("member", "member"))
    bringer = realiser.Realiser(daemon, roots.Roots(daemon.settings.gcroots, "t"), policy.Policy())
    reference = closures.ClosureReference(None, (member,))
    waiters = [asyncio.create_task(bringer.realise_closure(reference, root_name="r")) for _ in range(5)]
    await asyncio.sleep(0)
    waiters[0].cancel()
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert [type(result) for result in results[1:]] == [realiser.RealisedClosure] * 4
    assert opened == 1
    assert not bringer._running


async def test_without_nix_the_sentence_says_so(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "NIX_STATE_DIR": str(tmp_path)}
    settings = client.DaemonSettings.from_environment(environment)
    # sbin directories are searched as well, so the name has to be one that nobody has.
    settings = dataclasses.replace(settings, stdio=("no-nix-daemon", "--stdio"))
    with pytest.raises(errors.UnavailableError, match="Nix is not installed") as caught:
        async with client.DaemonStore(settings).session():
            pass
    assert "daemon-socket/socket" in caught.value.message
    assert "install Nix" in caught.value.hint


def test_a_remote_store_is_refused() -> None:
    with pytest.raises(errors.UnsupportedError, match="ssh://host names a store that is not on this host"):
        client.DaemonSettings.from_environment({"NIX_REMOTE": "ssh://host"})
