"""The client of the Nix daemon against the real Nix, over its socket and over the standard streams of a child."""

import asyncio
import contextlib
import dataclasses
import fcntl
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
        added = store.texts({f"file-{number}": f"content {number}" for number in range(200)})
        absent = path(store, f"{store.store_dir}/{'0' * 32}-absent")
        before = session.requests
        assert await session.present([*added, absent]) == set(added)
        assert session.requests == before + 1
    assert Path(added[7]).read_text() == "content 7"


async def test_the_closure_follows_references(store: PrivateStore, daemon: client.DaemonStore) -> None:
    async with daemon.session() as session:
        bottom = store.text("bottom", "bottom")
        middle = store.text("middle", f"needs {bottom}", [bottom])
        top = store.text("top", f"needs {middle}", [middle])
        other = store.text("other", "other")
        infos = await session.closure([top])
        assert infos.keys() == {top, middle, bottom}
        assert infos[top].references == {middle}
        assert interface.top_paths(infos) == (top,)
        assert set(interface.top_paths(infos | await session.closure([other]))) == {top, other}
        with pytest.raises(errors.NotFoundError, match="absent is not in the Nix store"):
            await session.path_infos([path(store, f"{store.store_dir}/{'0' * 32}-absent")])
        # The connection is as good as before.
        assert await session.present([top]) == {top}


async def test_a_path_that_nobody_has_is_named_with_the_reason(store: PrivateStore, daemon: client.DaemonStore) -> None:
    absent = path(store, f"{store.store_dir}/{'0' * 32}-absent")
    async with daemon.session() as session:
        present = store.text("present", "x")
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
        held = store.text("held", "held")
        await session.hold([held])
        loose = store.add("loose", "loose")
        await asyncio.to_thread(store.nix, "nix-store", "--gc")
        assert os.path.exists(held)
        assert not os.path.exists(loose)
    await asyncio.to_thread(store.nix, "nix-store", "--gc")
    assert not os.path.exists(held)


async def realise(
    bringer: realiser.Realiser, reference: closures.ClosureReference, gc_roots: roots.Roots | None = None
) -> realiser.RealisedClosure:
    """Have a closure in the store, and root it as "layer"."""
    async with bringer.realised(reference) as closure:
        if gc_roots is not None:
            await asyncio.to_thread(gc_roots.set, "layer", closure.roots)
        return closure


async def test_a_closure_is_kept_while_it_is_used_and_then_by_its_roots(
    store: PrivateStore, daemon: client.DaemonStore
) -> None:
    """Whatever the collector does between the end of the work and the roots."""
    gc_roots = roots.Roots(daemon.settings.gcroots, "test")
    bringer = realiser.Realiser(daemon, policy.Policy())
    bottom = store.text("bottom", "bottom")
    top = store.text("top", f"needs {bottom}", [bottom])
    reference = closures.ClosureReference(None, (bottom, top))
    async with bringer.realised(reference) as realised:
        await asyncio.to_thread(store.nix, "nix-store", "--gc")
        assert os.path.exists(bottom)
        # Who comes later uses the same connection.
        async with bringer.realised(reference) as again:
            assert again is realised
        await asyncio.to_thread(store.nix, "nix-store", "--gc")
        assert os.path.exists(bottom)
        await asyncio.to_thread(gc_roots.set, "layer", realised.roots)
    assert realised.members == tuple(sorted([bottom, top]))
    assert realised.took == interface.Realised()
    # One root is enough for both, since one refers to the other.
    assert gc_roots.paths("layer") == [top.name]
    await asyncio.to_thread(store.nix, "nix-store", "--gc")
    assert os.path.exists(bottom)
    gc_roots.remove("layer")
    await asyncio.to_thread(store.nix, "nix-store", "--gc")
    assert not os.path.exists(top)
    assert not os.path.exists(os.path.join(daemon.settings.gcroots, "nixlet"))


async def test_roots_of_our_own_hold_once_nix_knows_of_them(
    store: PrivateStore, daemon: client.DaemonStore, tmp_path: Path
) -> None:
    """As for an ordinary user, who can't write into Nix's directory of roots."""
    gc_roots = roots.Roots(str(tmp_path / "own"), "test", indirect=True)
    first, second, other = (store.text(name, name) for name in ("first", "second", "other"))
    await asyncio.to_thread(gc_roots.set, "layer", [first, second])
    links = gc_roots.links("layer")
    assert [os.readlink(link) for link in links] == sorted([first, second], key=os.path.basename)
    bringer = realiser.Realiser(daemon, policy.Policy())
    for _ in range(2):
        await bringer.keep(links)
        await asyncio.to_thread(store.nix, "nix-store", "--gc")
        assert (os.path.exists(first), os.path.exists(second), os.path.exists(other)) == (True, True, False)
    gc_roots.remove("layer")
    await asyncio.to_thread(store.nix, "nix-store", "--gc")
    assert not os.path.exists(first)
    # Nix forgets by itself.
    assert os.listdir(os.path.join(daemon.settings.gcroots, "auto")) == []


async def test_a_valid_path_that_is_not_on_the_disk_is_refused_by_name(store: PrivateStore) -> None:
    member = path(store, store.add("member", {"f": "1"}))
    info = path(store, store.add("closure-info", {"store-paths": f"{member}\n"}))
    bringer = realiser.Realiser(client.DaemonStore(store.settings), policy.Policy())
    for gone, reference in (
        (member, closures.ClosureReference(info)),
        (member, closures.ClosureReference(None, (member,))),
        (info, closures.ClosureReference(info)),
    ):
        os.rename(gone, f"{store.directory}/aside")
        with pytest.raises(
            errors.FailedPreconditionError, match=f"{gone} is missing from the disk, though Nix believes it valid"
        ) as caught:
            await realise(bringer, reference)
        assert f"nix-store --repair-path {gone}" in caught.value.hint
        os.rename(f"{store.directory}/aside", gone)
        assert (await realise(bringer, reference)).members == (member,)


async def test_a_closure_is_looked_for_on_the_disk_without_a_question_to_nix(store: PrivateStore) -> None:
    member = path(store, store.add("member", {"f": "1"}))
    info = path(store, store.add("closure-info", {"store-paths": f"{member}\n"}))
    nobody = dataclasses.replace(store.settings, stdio=("/nonexistent",), socket="/nonexistent")
    bringer = realiser.Realiser(client.DaemonStore(nobody), policy.Policy())
    forms = [closures.ClosureReference(info), closures.ClosureReference(None, (member,))]
    assert await bringer.on_disk(forms) == frozenset([member])
    assert await bringer.on_disk([]) == frozenset()
    # What Nix knows of its paths only Nix can say.
    assert await realiser.Realiser(client.DaemonStore(nobody), policy.Policy("deny")).on_disk(forms) is None
    for gone, lacking in ((member, forms), (info, forms[:1])):
        os.rename(gone, f"{store.directory}/aside")
        for each in lacking:
            assert await bringer.on_disk([each]) is None
        os.rename(f"{store.directory}/aside", gone)


async def test_the_closure_form_reads_the_list_of_the_closure_info(
    store: PrivateStore, daemon: client.DaemonStore
) -> None:
    member = store.add("member", "member")
    info = store.add("closure-info", {"store-paths": f"{member}\n"})
    gc_roots = roots.Roots(daemon.settings.gcroots, "test")
    bringer = realiser.Realiser(daemon, policy.Policy())
    realised = await realise(bringer, closures.ClosureReference(path(store, info)), gc_roots)
    assert realised.members == (member,)
    # A hand-made closureInfo refers to nothing, so its members need roots of their own.
    assert set(gc_roots.paths("layer")) == {os.path.basename(info), os.path.basename(member)}


@pytest.mark.parametrize("content", ["/etc/passwd\n", "../../etc\n", "--help\n", ""])
async def test_a_closure_info_that_lists_something_else_is_refused(store: PrivateStore, content: str) -> None:
    info = store.add("closure-info", {"store-paths": content} if content else {"other": "x"})
    daemon = client.DaemonStore(store.settings)
    bringer = realiser.Realiser(daemon, policy.Policy())
    with pytest.raises(errors.InvalidArgumentError, match=r"is not a store path|has no file store-paths"):
        await realise(bringer, closures.ClosureReference(path(store, info)))


async def test_a_policy_refuses_unsigned_paths(store: PrivateStore) -> None:
    daemon = client.DaemonStore(store.settings)
    strict = realiser.Realiser(daemon, policy.Policy("deny"))
    addressed = path(store, store.add("text", "content-addressed"))
    await realise(strict, closures.ClosureReference(None, (addressed,)))
    imported = store.text("text", "known by its name alone")
    with pytest.raises(errors.PermissionDeniedError, match=f"{imported} is unsigned"):
        await realise(strict, closures.ClosureReference(None, (imported,)))


async def test_a_closure_info_can_not_have_arbitrary_paths_fetched(store: PrivateStore) -> None:
    absent = path(store, f"{store.store_dir}/{'0' * 32}-absent")
    info = store.add("closure-info", {"store-paths": f"{absent}\n"})
    daemon = client.DaemonStore(store.settings)
    gc_roots = roots.Roots(daemon.settings.gcroots, "test")
    bringer = realiser.Realiser(daemon, policy.Policy())
    with pytest.raises(errors.InvalidArgumentError, match=f"lists {absent}, which it does not refer to") as caught:
        await realise(bringer, closures.ClosureReference(path(store, info)), gc_roots)
    assert f"nix-store --realise {absent}" in caught.value.hint
    assert gc_roots.names() == []


@pytest.mark.parametrize("minor", [27, 33, 34])
async def test_older_protocols_do(store: PrivateStore, minor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PROTOCOL", 1 << 8 | minor)
    absent = path(store, f"{store.store_dir}/{'0' * 32}-absent")
    async with client.DaemonStore(store.settings).session() as session:
        present = store.text("present", "x")
        added = store.text("file", "content")
        assert (await session.realise([present, added])) == interface.Realised()
        with pytest.raises(errors.NotFoundError, match=f"the store path {absent} is not .*: .*{absent.name}"):
            await session.realise([present, absent])
        assert (await session.closure([added])).keys() == {added}


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
    wanted = [path(origin, origin.add(f"file-{number}", f"{number}" * 1000)) for number in range(20)]
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
        said = f"{absent} is not in the Nix store and can't be fetched from file://{directory}: ."
        with pytest.raises(errors.NotFoundError, match=said):
            await session.realise([absent])


class GatedStore(client.DaemonStore):
    """The real store, whose sessions wait until they may go on."""

    def __init__(self, settings: client.DaemonSettings) -> None:
        super().__init__(settings)
        self.gate = asyncio.Event()
        self.opened = self.closed = 0

    @contextlib.asynccontextmanager
    async def session(self, *, anew: bool = False) -> AsyncIterator[session_module.DaemonSession]:
        async with super().session(anew=anew) as session:
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
    bringer = realiser.Realiser(gated, policy.Policy())
    first, second = (asyncio.create_task(realise(bringer, reference)) for _ in range(2))
    await until_opened(gated, 1)
    first.cancel()
    await asyncio.wait([first])
    third = asyncio.create_task(realise(bringer, reference))
    await asyncio.sleep(0)
    gated.gate.set()
    assert await second is await third
    assert (gated.opened, gated.closed) == (1, 1)
    assert not bringer._running


async def test_who_wants_nothing_fetched_is_served_by_who_holds_the_closure(store: PrivateStore) -> None:
    gated = GatedStore(store.settings)
    gated.gate.set()
    reference = closures.ClosureReference(None, (path(store, store.add("member", "member")),))
    bringer = realiser.Realiser(gated, policy.Policy())
    async with contextlib.AsyncExitStack() as stack:
        fetched = await stack.enter_async_context(bringer.realised(reference))
        # Nobody gets a new session any more.
        gated.gate.clear()
        held = await stack.enter_async_context(bringer.realised(reference, fetch=False))
        assert held is fetched
    assert (gated.opened, gated.closed) == (1, 1)
    assert not bringer._running


async def test_work_that_all_gave_up_ends_and_begins_again(store: PrivateStore) -> None:
    gated = GatedStore(store.settings)
    member = path(store, store.add("member", "member"))
    bringer = realiser.Realiser(gated, policy.Policy())
    reference = closures.ClosureReference(None, (member,))
    first = asyncio.create_task(realise(bringer, reference))
    await until_opened(gated, 1)
    first.cancel()
    await asyncio.wait([first], timeout=0.01)
    gated.gate.set()
    assert (await realise(bringer, reference)).members == (member,)
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (gated.opened, gated.closed) == (2, 2)
    assert not bringer._running


async def test_a_failure_is_told_to_all_who_wait_and_tried_again_by_the_next(store: PrivateStore) -> None:
    gated = GatedStore(store.settings)
    bringer = realiser.Realiser(gated, policy.Policy())
    absent = path(store, f"{store.store_dir}/{'0' * 32}-absent")
    reference = closures.ClosureReference(None, (absent,))
    waiting = [asyncio.create_task(realise(bringer, reference)) for _ in range(2)]
    await until_opened(gated, 1)
    gated.gate.set()
    told = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(each) for each in told] == [errors.NotFoundError] * 2
    with pytest.raises(errors.NotFoundError):
        await realise(bringer, reference)
    assert (gated.opened, gated.closed) == (2, 2)
    assert not bringer._running


async def test_paths_are_held_for_a_context(store: PrivateStore) -> None:
    members = [path(store, store.add(name, name)) for name in ("one", "two")]
    bringer = realiser.Realiser(client.DaemonStore(store.settings), policy.Policy())
    async with bringer.holding(members):
        await asyncio.to_thread(store.nix, "nix-store", "--gc")
        assert all(map(os.path.exists, members))
    await asyncio.to_thread(store.nix, "nix-store", "--gc")
    assert not any(map(os.path.exists, members))


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


async def test_who_waits_for_a_garbage_collection_is_told_so(
    store: PrivateStore, daemon: client.DaemonStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes: the daemon answers when it has its lock."""
    monkeypatch.setattr(realiser, "_PATIENCE", 0.5)
    monkeypatch.setattr(client, "_OPEN_TIMEOUT", 1.0)
    member = path(store, store.add("member", "member"))
    bringer = realiser.Realiser(daemon, policy.Policy())
    steps: list[progress.Progress] = []
    told = asyncio.Event()

    def sink(step: progress.Progress) -> None:
        steps.append(step)
        if len(steps) == 3:
            told.set()

    async def hold() -> None:
        async with bringer.holding([member], sink):
            pass

    lock = f"{store.state_dir}/db/big-lock"
    with open(lock, "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        holding = asyncio.create_task(hold())
        async with asyncio.timeout(20):
            await told.wait()
        assert not holding.done()
    await holding
    waiting = progress.Progress(
        "waiting for Nix", 0, 0, "", f"process {os.getpid()} holds {lock}, as a garbage collection does"
    )
    assert set(steps) == {waiting}
    assert daemon.awaited() == ""


async def test_a_program_is_added_as_nix_does_it(
    store: PrivateStore, daemon: client.DaemonStore, tmp_path: Path
) -> None:
    program = tmp_path / "package" / "bin" / "server"
    program.parent.mkdir(parents=True)
    # Of several pieces, and with padding behind it.
    program.write_bytes(os.urandom((3 << 18) + 5))
    program.chmod(0o755)
    async with daemon.session() as session:
        with program.open("rb") as file:
            added = await session.add_program("server", file, program.stat().st_size)
        made = Path(added) / "bin" / "server"
        assert made.read_bytes() == program.read_bytes()
        assert made.stat().st_mode & 0o777 == 0o555
        with program.open("rb") as file:
            assert await session.add_program("server", file, program.stat().st_size) == added
        # It is held, and the connection is good for more.
        collected = await asyncio.to_thread(store.nix, "nix-store", "--gc")
        assert str(added) not in collected
        assert await session.present([added]) == {added}
    renamed = tmp_path / "server"
    program.parent.parent.rename(renamed)
    renamed.chmod(0o755)
    assert store.nix("nix-store", "--add", str(renamed)) == added


async def test_a_program_that_changes_is_not_added(daemon: client.DaemonStore, tmp_path: Path) -> None:
    program = tmp_path / "server"
    program.write_bytes(bytes(100))
    for size in (99, 101):
        async with daemon.session() as session:
            with program.open("rb") as file, pytest.raises(errors.FailedPreconditionError, match="while it is read"):
                await session.add_program("server", file, size)
            assert not session.alive
    async with daemon.session() as session:
        assert await session.closure([]) == {}


async def test_a_program_that_the_store_refuses_is_told(daemon: client.DaemonStore, tmp_path: Path) -> None:
    program = tmp_path / "server"
    program.write_bytes(os.urandom(8 << 20))
    async with daemon.session() as session:
        with program.open("rb") as file, pytest.raises(errors.NixletError, match="name"):
            await session.add_program("no name", file, program.stat().st_size)
