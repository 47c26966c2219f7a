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
from nixlet.store.daemon import client, wire
from nixlet.store.daemon import session as session_module
from nixlet.telemetry import progress
from support import storeimages
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


async def test_a_closure_info_can_not_have_arbitrary_paths_fetched(store: PrivateStore) -> None:
    absent = path(store, f"{store.store_dir}/{'0' * 32}-absent")
    info = store.add("closure-info", {"store-paths": f"{absent}\n"})
    daemon = client.DaemonStore(store.settings)
    gc_roots = roots.Roots(daemon.settings.gcroots, "test")
    bringer = realiser.Realiser(daemon, gc_roots, policy.Policy())
    with pytest.raises(errors.InvalidArgumentError, match=f"lists {absent}, which it does not refer to") as caught:
        await bringer.realise_closure(closures.ClosureReference(path(store, info)), root_name="layer")
    assert f"nix-store --realise {absent}" in caught.value.hint
    assert gc_roots.names() == []


async def test_a_failure_takes_back_new_roots_only(store: PrivateStore) -> None:
    absent = path(store, f"{store.store_dir}/{'0' * 32}-absent")
    present = path(store, store.add("present", "present"))
    daemon = client.DaemonStore(store.settings)
    gc_roots = roots.Roots(daemon.settings.gcroots, "test")
    bringer = realiser.Realiser(daemon, gc_roots, policy.Policy())
    reference = closures.ClosureReference(None, (present, absent))
    gc_roots.add("old", [present])
    for name in ("new", "old"):
        with pytest.raises(errors.NotFoundError):
            await bringer.realise_closure(reference, root_name=name)
    assert gc_roots.names() == ["old"]
    assert gc_roots.paths("old") == [present.name]


async def test_an_archive_goes_from_store_to_store(tmp_path: Path, store: PrivateStore) -> None:
    built_by = tmp_path / "built.nix"
    built_by.write_text(
        'derivation { name = "built"; system = builtins.currentSystem; builder = "/bin/sh";'
        ' args = ["-c" "n=0; while [ $n -lt 30000 ]; do echo $n; n=$((n + 1)); done > $out"]; }'
    )
    built = path(store, store.nix("nix-build", "--no-out-link", str(built_by)))
    daemon = client.DaemonStore(store.settings)
    async with daemon.session() as session:
        info = (await session.path_infos([built]))[built]
        pieces = [piece async for piece in session.nar(built)]
        # The archive's end was found: the next reply is read from its beginning.
        assert await session.present([built]) == {built}
    assert sum(map(len, pieces)) == info.nar_size
    assert b"".join(pieces) == _dump(store, built)
    assert info.ultimate
    store.nix("nix-store", "--delete", built)
    unsigned = dataclasses.replace(info, ultimate=False, deriver="")
    async with daemon.session() as session:
        with pytest.raises(errors.NixletError, match="lacks a valid signature"):
            await session.import_nar(unsigned, pieces)
        assert await session.present([built]) == set()

        async def bit_by_bit() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece[:100]
                yield piece[100:]

        await session.import_nar(unsigned, bit_by_bit(), check_signatures=False)
        assert (await session.path_infos([built]))[built].nar_hash == info.nar_hash
        with pytest.raises(errors.NotFoundError, match="absent is not in the Nix store"):
            await anext(session.nar(path(store, f"{store.store_dir}/{'0' * 32}-absent")))
        assert await session.present([built]) == {built}
    assert (tmp_path / "nix" / "store" / built.name).read_text().startswith("0\n1\n")


async def test_the_session_collects_garbage_and_tells_what_holds_the_rest(
    store: PrivateStore, daemon: client.DaemonStore
) -> None:
    gc_roots = roots.Roots(daemon.settings.gcroots, "test")
    rooted, loose = (path(store, store.add(name, name)) for name in ("rooted", "loose"))
    gc_roots.add("layer", [rooted])
    async with daemon.session() as session:
        held = await session.add_text("held", "held")
        await session.hold([held])
        found = await session.find_roots()
        assert (os.path.join(daemon.settings.gcroots, "nixlet/test/layer", rooted.name), rooted) in found
        assert next(link for link, target in found if target == held).startswith("{temp:")
        collected = await session.collect_garbage()
        assert loose in collected.paths
        assert collected.freed_bytes > 0
        assert await session.present([rooted, held, loose]) == {rooted, held}
        with pytest.raises(errors.NixletError, match=rooted.name):
            await session.delete([rooted])
        doomed = path(store, store.add("doomed", "doomed"))
        assert await session.delete([doomed]) > 0
        assert await session.present([doomed]) == set()


@pytest.mark.parametrize("minor", [27, 33, 34])
async def test_older_protocols_do(store: PrivateStore, minor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PROTOCOL", 1 << 8 | minor)
    absent = path(store, f"{store.store_dir}/{'0' * 32}-absent")
    async with client.DaemonStore(store.settings).session() as session:
        present = await session.add_text("present", "x")
        added = await session.add_nar("file", storeimages.nar(storeimages.nar_file(b"content")))
        assert (await session.realise([present, added])) == interface.Realised()
        with pytest.raises(errors.NotFoundError, match=f"the store path {absent} is not .*: .*{absent.name}"):
            await session.realise([present, absent])
        assert (await session.closure([added])).keys() == {added}
        assert bool(session.nix_version) is (minor >= 33)


async def test_many_absent_paths_are_named_by_the_first_three(store: PrivateStore) -> None:
    absent = [path(store, f"{store.store_dir}/{number * 32}-absent") for number in "01234"]
    async with client.DaemonStore(store.settings).session() as session:
        with pytest.raises(errors.NotFoundError) as caught:
            await session.realise(absent)
    assert f"the store paths {', '.join(absent[:3])} and 2 more are not in the Nix store" in caught.value.message
    assert f"nix-store --realise {absent[0]}" in caught.value.hint


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[tuple[Path, PrivateStore]]:
    origin = PrivateStore(tmp_path / "origin")
    yield tmp_path / "cache", origin
    origin.remove()


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        wbufsize = -1

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class calls it so)
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


async def test_a_missing_signature_is_given_as_the_reason(tmp_path: Path, cache: tuple[Path, PrivateStore]) -> None:
    directory, origin = cache
    built_by = tmp_path / "built.nix"
    built_by.write_text(
        'derivation { name = "built"; system = builtins.currentSystem; builder = "/bin/sh"; args = ["-c" "echo > $out"]; }'
    )
    built = origin.nix("nix-build", "--no-out-link", str(built_by))
    origin.nix("nix", "copy", "--to", f"file://{directory}", built)
    origin.remove()
    consumer = PrivateStore(origin.directory, substituters=f"file://{directory}")
    async with client.DaemonStore(consumer.settings).session() as session:
        with pytest.raises(errors.NotFoundError, match=r"not signed by any of the keys in 'trusted-public-keys'"):
            await session.realise([path(consumer, built)])


async def test_a_cache_that_does_not_answer_leaves_the_others(cache: tuple[Path, PrivateStore]) -> None:
    directory, origin = cache
    member = origin.add("member", "member")
    origin.nix("nix", "copy", "--to", f"file://{directory}", member)
    origin.remove()
    # Port 1 is nobody's: the connection is refused at once.
    nobody = {"substituters": f"http://127.0.0.1:1 file://{directory}", "download-attempts": "1"}
    consumer = PrivateStore(origin.directory, **nobody)
    async with client.DaemonStore(consumer.settings).session() as session:
        took = await session.realise([path(consumer, member)])
        assert took.fetched_paths == 1
        absent = path(consumer, f"{consumer.store_dir}/{'0' * 32}-absent")
        with pytest.raises(errors.NotFoundError, match=f"{absent} is not in the Nix store and can't be fetched: ."):
            await session.realise([absent])


class GatedStore(client.DaemonStore):
    """The real store, whose sessions wait until they may go on."""

    def __init__(self, settings: client.DaemonSettings) -> None:
        super().__init__(settings)
        self.gate = asyncio.Event()
        self.opened = self.closed = 0

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[session_module.DaemonSession]:
        async with super().session() as session:
            self.opened += 1
            try:
                await self.gate.wait()
                yield session
            finally:
                # Closing takes a while, as that of a busy daemon does.
                await asyncio.sleep(0.05)
                self.closed += 1


async def until_opened(gated: GatedStore, number: int) -> None:
    async with asyncio.timeout(20):
        while gated.opened < number:
            await asyncio.sleep(0.01)


async def test_who_comes_later_shares_the_work_that_others_left(store: PrivateStore) -> None:
    gated = GatedStore(store.settings)
    reference = closures.ClosureReference(None, (path(store, store.add("member", "member")),))
    bringer = realiser.Realiser(gated, roots.Roots(gated.settings.gcroots, "t"), policy.Policy())
    first, second = (asyncio.create_task(bringer.realise_closure(reference)) for _ in range(2))
    await until_opened(gated, 1)
    first.cancel()
    await asyncio.wait([first])
    third = asyncio.create_task(bringer.realise_closure(reference))
    await asyncio.sleep(0)
    gated.gate.set()
    assert await second is await third
    assert gated.opened == 1
    assert not bringer._running


async def test_work_that_all_gave_up_ends_before_it_begins_again(store: PrivateStore) -> None:
    gated = GatedStore(store.settings)
    member = path(store, store.add("member", "member"))
    gc_roots = roots.Roots(gated.settings.gcroots, "t")
    bringer = realiser.Realiser(gated, gc_roots, policy.Policy())
    reference = closures.ClosureReference(None, (member,))
    first = asyncio.create_task(bringer.realise_closure(reference, root_name="layer"))
    await until_opened(gated, 1)
    first.cancel()
    await asyncio.wait([first])
    gated.gate.set()
    assert (await bringer.realise_closure(reference, root_name="layer")).paths == (member,)
    assert (gated.opened, gated.closed) == (2, 2)
    assert gc_roots.paths("layer") == [member.name]
    assert not bringer._running


async def test_the_same_paths_are_realised_once_and_held_for_a_context(store: PrivateStore) -> None:
    gated = GatedStore(store.settings)
    members = [path(store, store.add(name, name)) for name in ("one", "two")]
    bringer = realiser.Realiser(gated, roots.Roots(gated.settings.gcroots, "t"), policy.Policy())
    waiting = [asyncio.create_task(bringer.realise_paths(order)) for order in (members, members[::-1])]
    await until_opened(gated, 1)
    gated.gate.set()
    assert await asyncio.gather(*waiting) == [interface.Realised()] * 2
    assert gated.opened == 1
    async with bringer.holding(members):
        await asyncio.to_thread(store.nix, "nix-store", "--gc")
        assert all(map(os.path.exists, members))
    await asyncio.to_thread(store.nix, "nix-store", "--gc")
    assert not any(map(os.path.exists, members))
    with pytest.raises(errors.NotFoundError):
        await bringer.realise_paths(members)
    assert not bringer._running_paths


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
