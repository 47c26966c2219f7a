"""The node's interface as another Varlink client sees it, which reads its description and takes everything at its word."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import varlink

from nixlet.services import nodeaddress
from support import nodes, storeimages

pytestmark = pytest.mark.slow


@pytest.fixture
def asked(any_node: nodes.Node) -> Iterator[Any]:
    """The node's methods."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(varlink.Client.new_with_address(f"unix:{any_node.control_socket}"))
        yield stack.enter_context(client.open(nodeaddress.INTERFACE))


@pytest.fixture
def sleeping(any_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]) -> Iterator[str]:
    """The ID of a container that sleeps, called "asleep"."""
    image = store_images[50].reference
    command = ["/bin/sh", "-c", "trap 'exit 7' TERM; while :; do /bin/busybox sleep 0.1; done"]
    yield any_node.ok("run", "-d", "--name", "asleep", image, "--", *command).strip()
    any_node.run("rm", "-f", "asleep")


def test_a_containers_life(any_node: nodes.Node, asked: Any, sleeping: str) -> None:
    status = asked.GetStatus()
    assert (status["state_dir"], status["pid"]) == (str(any_node.state_dir), any_node.pid)
    assert [child["name"] for child in status["children"]] == ["containerd"]
    (kept,) = asked.GetChildren()["children"]
    assert (kept["name"], kept["pid"], kept["state"]) == ("containerd", status["children"][0]["pid"], "ready")
    assert kept["log"] == str(any_node.containerd_log)
    assert asked.GetSilent() == {"programs": []}
    (listed,) = asked.ListContainers(False)["containers"]
    assert (listed["id"], listed["name"], listed["pod"], listed["state"]) == (sleeping, "asleep", "asleep", "running")
    (inspected,) = asked.InspectContainers(["asleep"])["containers"]
    assert (inspected["id"], inspected["state"]["created"]) == (sleeping, listed["created"])
    (used,) = asked.ContainerStats([sleeping[:12]])["containers"]
    assert (used["name"], used["memory_bytes"] > 0) == ("asleep", True)
    seen = []
    for answer in asked.ContainerStats([], _more=True):
        seen += [each["id"] for each in answer["containers"]]
        if len(seen) == 3:
            break
    assert seen == [sleeping] * 3


def test_stopping_waiting_and_removing(any_node: nodes.Node, asked: Any, sleeping: str) -> None:
    with pytest.raises(varlink.VarlinkError) as raised:
        asked.InspectContainers(["nobody"])
    error = raised.value.as_dict()
    assert (error["error"], error["parameters"]["kind"]) == ("org.nixlet.Failed", "NotFoundError")
    assert error["parameters"]["message"] == "there is no container nobody"
    refused = asked.RemoveContainers(["asleep"], False)
    assert refused["failure"]["message"] == "container asleep is running"
    replies = list(asked.StopContainers(["asleep", "nobody"], 5, _more=True))
    assert [(each["container"], "failure" in each) for each in replies] == [("asleep", False), ("nobody", True)]
    assert asked.WaitContainer("asleep") == {"exit_code": 7}
    assert asked.ListContainers(False) == {"containers": []}
    (ended,) = asked.ListContainers(True)["containers"]
    assert (ended["id"], ended["state"]) == (sleeping, "exited")
    assert asked.RemoveContainers([sleeping], False) == {"container": sleeping}
    assert asked.ListContainers(True) == {"containers": []}
    # The rest goes on behind the answer.
    nodes.until(lambda: any_node.crictl("pods", "-q") == "", "the pod is gone")


def test_many_are_stopped_and_removed_at_once(
    any_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]
) -> None:
    nodes.until(lambda: not any_node.packet_rules(), "earlier tests' pods are gone")
    networks = set(os.listdir("/run/netns"))
    names = [f"one-of-many-{number}" for number in range(12)]
    try:
        for name in names:
            any_node.ok("run", "-d", "--name", name, store_images[50].reference, "--", "/bin/sleep", "1000")
        with_one_wrong = [*names[:6], "nobody", *names[6:]]
        stopped = any_node.run("stop", "-t", "1", *with_one_wrong)
        assert (stopped.returncode, stopped.stdout.decode().split()) == (125, names)
        assert stopped.stderr.decode().splitlines()[0] == "error: there is no container nobody"
        assert any_node.ok("ps", "-q") == ""
        # What they hold is given back at once, and nobody waits for it.
        nodes.until(lambda: not any_node.packet_rules(), "their rules go")
        nodes.until(lambda: set(os.listdir("/run/netns")) == networks, "their networks go")
        any_node.ok("run", "-d", "--name", "running-beside", store_images[50].reference, "--", "/bin/sleep", "1000")
        removed = any_node.run("rm", "running-beside", *names)
        assert (removed.returncode, removed.stdout.decode().split()) == (125, names)
        assert removed.stderr.decode().splitlines()[0] == "error: container running-beside is running"
    finally:
        any_node.run("rm", "-f", "running-beside", *names)
    assert any_node.crictl("pods", "-q") == ""
    assert (any_node.packet_rules(), set(os.listdir("/run/netns"))) == ([], networks)


#: What takes longer to import than these verbs take otherwise.
HEAVY = {
    "asyncio",
    "click",
    "dataclasses",
    "google",
    "grpclib",
    "h2",
    "inspect",
    "msgspec",
    "platform",
    "rich",
    "typing",
}

#: How many modules a verb may load, those that the interpreter loads by itself included; it was 86 to 89 when this was written.
MOST_MODULES = 100


@pytest.mark.parametrize(
    "verb",
    [
        ("ps",),
        ("ps", "--all", "--output", "json"),
        ("inspect", "asleep"),
        ("stats", "--no-stream"),
        ("version",),
        ("stop", "-t", "0", "asleep"),
        ("rm", "-f", "asleep"),
    ],
)
def test_who_only_asks_loads_little(any_node: nodes.Node, sleeping: str, verb: tuple[str, ...]) -> None:
    assert sleeping
    argv = [sys.executable, "-X", "importtime", "-m", "nixlet", *verb]
    done = subprocess.run(argv, env=any_node.environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert not {each.partition(".")[0] for each in loaded} & HEAVY
    assert not {each for each in loaded if each.startswith("nixlet.rpc")}
    assert len(loaded) <= MOST_MODULES, loaded
