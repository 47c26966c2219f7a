"""Which manifests nobody is writing, by a clock of the test's own."""

import logging
from types import SimpleNamespace

import pytest

from nixlet import errors
from nixlet.node.manifests import directory, resting


class World:
    """Files, and a clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.files: dict[str, bytes] = {}
        self.changed: dict[str, directory.State] = {}
        self.resting = resting.Resting(self._read)

    def _read(self, name: str) -> bytes:
        if self.files[name] == b"unreadable":
            raise errors.PermissionDeniedError("others can write it")
        return self.files[name]

    def write(self, name: str, content: bytes) -> None:
        self.files[name] = content
        self.changed[name] = directory.State(1, 1, len(content), 0, int(self.now * 1e9))

    async def look(self) -> list[str]:
        return sorted(await self.resting.look(self.changed))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(resting, "time", SimpleNamespace(time=lambda: made.now, monotonic=lambda: made.now))
    return made


async def test_a_file_rests_a_while_after_its_last_change(world: World) -> None:
    world.write("a", b"1")
    assert await world.look() == []
    world.now += 1
    world.write("a", b"12")
    assert await world.look() == []
    world.now += 2
    assert await world.look() == ["a"]
    assert world.resting.content("a") == b""
    # A change in the future says that the clock was changed.
    world.now -= 1000
    assert await world.look() == ["a"]


async def test_what_is_touched_rests_as_long_as_the_same_stands_in_it(world: World) -> None:
    seen = []
    for content in (b"1", b"1", b"1", b"1", b"2", b"2", b"2", b"2"):
        world.write("a", content)
        seen.append(await world.look())
        world.now += 1
    assert seen == [[], [], ["a"], ["a"], [], [], ["a"], ["a"]]
    assert world.resting.content("a") == resting.sum_of(b"2")
    assert world.resting.late == []


async def test_what_changes_without_an_end_is_told_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for number in range(45):
        world.write("a", str(number).encode())
        world.write("b", b"unreadable")
        assert await world.look() == []
        world.now += 1
    assert world.resting.late == ["a", "b"]
    assert caplog.messages == [f"the manifest {name} is not applied: {resting.RESTLESS}" for name in ("a", "b")]
    # As soon as it rests nothing is left of it.
    world.now += 1
    assert await world.look() == ["a", "b"]
    assert world.resting.late == []


async def test_ours_are_whole_and_what_others_make_of_them_is_not(world: World) -> None:
    world.write("ours", b"1")
    world.resting.wrote("ours", world.changed["ours"])
    assert await world.look() == ["ours"]
    world.now += 1
    world.write("ours", b"half of")
    assert await world.look() == []
