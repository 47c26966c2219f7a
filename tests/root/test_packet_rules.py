"""Taking rules of the packet filter back, in the kernel's own."""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest

from nixlet.host import iptables, process

CONTAINER = "nixlet-test-of-packet-rules"
CHAIN = f"CNI-{'0123456789abcdef' * 2}"[:28]
COMMENT = ["-m", "comment", "--comment", f'name: "nixlet test" id: "{CONTAINER}"']


async def filtered(*arguments: str) -> str:
    return (await process.run(["iptables", "-w", "-t", "nat", *arguments])).check().stdout.decode()


async def saved() -> str:
    return (await process.run(["iptables-save", "-t", "nat"])).check().stdout.decode()


@pytest.fixture
async def rules() -> AsyncIterator[None]:
    """Rules as the bridge plugin makes them for one container."""
    await filtered("-N", CHAIN)
    try:
        await filtered("-A", CHAIN, "-d", "192.0.2.0/24", *COMMENT, "-j", "ACCEPT")
        await filtered("-A", "POSTROUTING", "-s", "192.0.2.7/32", *COMMENT, "-j", CHAIN)
        yield
    finally:
        await iptables.remove_rules(container=CONTAINER)
        for command in (["-F", CHAIN], ["-X", CHAIN]):
            await process.run(["iptables", "-w", "-t", "nat", *command])


async def test_all_of_a_containers_rules_go_at_once(rules: None, monkeypatch: pytest.MonkeyPatch) -> None:
    del rules
    started: list[str] = []
    run = process.run

    async def counted(argv: Sequence[str], *, stdin: bytes = b"", timeout: float | None = None) -> process.Completed:
        started.append(argv[0])
        return await run(argv, stdin=stdin, timeout=timeout)

    monkeypatch.setattr(process, "run", counted)
    await iptables.remove_rules(container=CONTAINER)
    monkeypatch.undo()
    assert CONTAINER not in await saved()
    assert CHAIN not in await saved()
    assert sorted(started) == ["ip6tables-save", "iptables-restore", "iptables-save"]


async def test_what_somebody_else_uses_keeps_nothing_else_from_going(rules: None) -> None:
    del rules
    await filtered("-A", "OUTPUT", "-s", "192.0.2.8/32", "-j", CHAIN)
    try:
        await iptables.remove_rules(container=CONTAINER)
        assert CONTAINER not in await saved()
        assert CHAIN in await saved()
    finally:
        await filtered("-D", "OUTPUT", "-s", "192.0.2.8/32", "-j", CHAIN)


@pytest.mark.parametrize("program", ["iptables-save", "iptables-restore"])
@pytest.mark.parametrize(
    "remove",
    [functools.partial(iptables.remove_rules, container=CONTAINER), functools.partial(iptables.remove_chains, [CHAIN])],
    ids=["rules", "chains"],
)
async def test_a_packet_filter_that_is_busy_is_tried_again(
    rules: None, monkeypatch: pytest.MonkeyPatch, program: str, remove: Callable[[], Awaitable[None]]
) -> None:
    del rules
    busy = [program]
    run = process.run

    async def once_busy(argv: Sequence[str], *, stdin: bytes = b"", timeout: float | None = None) -> process.Completed:
        if argv[0] in busy:
            busy.remove(argv[0])
            return process.Completed(tuple(argv), 4, b"", b"Resource temporarily unavailable.\n")
        return await run(argv, stdin=stdin, timeout=timeout)

    monkeypatch.setattr(process, "run", once_busy)
    await remove()
    monkeypatch.undo()
    assert busy == []
    assert CONTAINER not in await saved()
    assert CHAIN not in await saved()
