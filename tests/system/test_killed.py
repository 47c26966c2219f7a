"""kill -9 of a client, of containerd, of the node, each while a container prints a megabyte a second."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import nodes, parts, storeimages

pytestmark = pytest.mark.slow

SECONDS = 90.0

#: Lines of a hundred bytes, a thousand of them ten times a second, and how many thousands.
THOUSANDS = 80
PRINTING = """
i=0
while [ $i -lt THOUSANDS ]; do
    busybox awk -v i=$i 'BEGIN { for (n = 0; n < 1000; n++) printf "%099d\\n", i * 1000 + n }'
    i=$((i+1))
    busybox sleep 0.1
done
exit 7
""".replace("THOUSANDS", str(THOUSANDS))
PRINTED = [b"%099d" % number for number in range(THOUSANDS * 1000)]


@pytest.fixture
def image(store_images: dict[int, storeimages.StoreImage]) -> str:
    return store_images[1].reference


@pytest.fixture(params=parts.CONTAINERDS[2:])
def own_node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[nodes.Node]:
    """A node whose parts a test may kill."""
    made = nodes.Node(5, tmp_path, "--containerd", str(parts.containerd(request.param)))
    with nodes.cleaned_up(made):
        made.start()
        yield made


def kill_containerd(node: nodes.Node) -> None:
    (containerd,) = nodes.named(node, "containerd")
    os.kill(containerd, signal.SIGKILL)


def kill_node(node: nodes.Node) -> None:
    node.kill()
    node.start()


def logged(node: nodes.Node) -> int:
    return sum(path.stat().st_size for path in (node.data_dir / "agent" / "pods").rglob("*.log*"))


def grows(node: nodes.Node) -> None:
    before = logged(node)
    nodes.until(lambda: logged(node) > before + 500_000, "it goes on, and its log")


def check(node: nodes.Node, kill: Callable[[nodes.Node], object]) -> None:
    """Kill something while the container "printing" prints; all of it is logged, and it can be followed and attached to."""
    grows(node)
    kill(node)
    # It has gone on while nobody was there to answer; who asks is answered again.
    nodes.until(lambda: node.run("ps").returncode == 0, "containerd is back")
    with node.started("logs", "-f", "printing") as following, node.started("attach", "printing") as attached:
        assert following.stdout is not None
        output = attached.stdout
        assert output is not None
        taken: list[bytes] = []
        taking = threading.Thread(target=lambda: taken.append(output.read()))
        taking.start()
        seen = following.stdout.read().splitlines()
        taking.join()
        assert following.wait(SECONDS) == 0
        assert attached.wait(SECONDS) == 7
    # What was being logged when the node was killed may stand there twice; nothing is missing, or at another place.
    assert list(dict.fromkeys(seen)) == PRINTED
    assert len(seen) - len(PRINTED) <= (128 << 10) // 100 + 1
    lines = taken[0].splitlines()
    assert len(lines) > 1000
    assert lines[1:] == PRINTED[-len(lines) + 1 :]
    assert json.loads(node.ok("inspect", "printing"))[0]["state"]["exit_code"] == 7


def test_a_client_that_is_killed(own_node: nodes.Node, image: str) -> None:
    with own_node.started("run", "--name", "printing", image, "--", "/bin/sh", "-c", PRINTING) as client:
        assert client.stdout is not None
        client.stdout.read(1000)
        check(own_node, lambda _: client.kill())


@pytest.mark.parametrize("kill", [kill_containerd, kill_node])
def test_the_node_or_its_containerd_is_killed(
    own_node: nodes.Node, image: str, kill: Callable[[nodes.Node], None]
) -> None:
    own_node.ok("run", "-d", "--name", "printing", image, "--", "/bin/sh", "-c", PRINTING)
    check(own_node, kill)


def test_a_client_that_reads_nothing_holds_nothing_up_for_ever(own_node: nodes.Node, image: str) -> None:
    with own_node.started("run", "--name", "printing", image, "--", "/bin/sh", "-c", PRINTING) as client:
        nodes.until(lambda: own_node.ok("ps", "-q"), "it runs")
        assert own_node.run("logs", "-f", "printing").stdout.splitlines() == PRINTED
        assert client.stdout is not None
        shown = client.stdout.read()
        assert client.wait(SECONDS) == 7
    before, told, rest = shown.partition(b"\nnixlet: ")
    missing, _, after = rest.partition(b" bytes are left out here: nobody read them for 10 s\n")
    assert told
    assert len(before) + int(missing) + len(after) == len(PRINTED) * 100


def test_what_exec_left_is_ended_by_the_next_node(own_node: nodes.Node, image: str) -> None:
    own_node.ok("run", "-d", "--name", "lives", image, "--", "/bin/sleep", "1000")
    with own_node.started("exec", "lives", "/bin/sh", "-c", "echo up; exec sleep 2000") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        own_node.kill()
        assert process.wait(SECONDS) == 125
    assert list(own_node.state_dir.glob("exec-*"))
    own_node.start()
    assert not list(own_node.state_dir.glob("exec-*"))
    running = own_node.ok("exec", "lives", "/bin/sh", "-c", "cat /proc/[0-9]*/cmdline | /bin/busybox tr '\\0' ' '")
    assert ("sleep 1000" in running, "sleep 2000" in running) == (True, False)
