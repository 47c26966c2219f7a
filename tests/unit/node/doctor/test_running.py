"""What doctor says of the children of a node that runs."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import children, supervisor, unixsocket
from nixlet.node.doctor import machine, running
from nixlet.node.settings import config
from nixlet.services import nodeaddress, nodestatus
from nixlet.varlink import server as varlink

#: A node whose children alone matter here.
NODE = nodestatus.NodeStatus("nix", "/data", "/state", "/c.sock", 3, "/pods", "/etc/resolv.conf")

#: What it says besides.
REMARKS: dict[str, Callable[[], str]] = {"registries": str, "manifests": lambda: "bad.yaml: it is no YAML"}


async def answers() -> None:
    return


async def test_children_are_told_as_they_do(tmp_path: Path) -> None:
    layout = config.Layout(str(tmp_path / "data"), str(tmp_path))
    assert await asyncio.to_thread(running.looks, layout) == {}

    def described(name: str, script: str, *waits_for: str) -> supervisor.Program:
        return supervisor.Program(
            name=name,
            argv=["sh", "-c", script],
            env={},
            log_path=str(tmp_path / f"{name}.log"),
            ready=answers if name != "starts" else asyncio.Event().wait,
            ready_timeout=60,
            waits_for=waits_for,
            restart=supervisor.RestartPolicy(tries=0 if name == "dead" else 5, first_delay=0.01),
        )

    again = f"test -e {tmp_path}/once && exec sleep 60; touch {tmp_path}/once; sleep 0.2; exit 3"
    async with children.kept_running() as kept:
        status = nodestatus.StatusService(NODE, list, kept.status, None, answers, REMARKS)
        listening = unixsocket.listen(layout.control_socket)
        async with varlink.serve(listening, [varlink.Interface(nodeaddress.INTERFACE, "", status.methods())]):
            assert list(await asyncio.to_thread(running.looks, layout)) == ["manifests"]
            kept.start(
                described("well", "exec sleep 60"),
                described("again", again),
                described("dead", "sleep 0.2; exit 4"),
                described("starts", "exec sleep 60"),
                described("waits", "exec sleep 60", "starts"),
            )
            async with asyncio.timeout(30):
                while (kept["again"].restarts, kept["again"].state, kept["dead"].state) != (1, "ready", "gave up"):
                    await asyncio.sleep(0.01)
            looks = await asyncio.to_thread(running.looks, layout)
    assert list(looks) == ["well", "again", "dead", "starts", "waits", "manifests"]
    with pytest.raises(machine.Worse) as worse:
        looks["manifests"]()
    assert worse.value.evidence == "bad.yaml: it is no YAML"
    assert looks["well"]().startswith("process ")
    assert " ready since 2" in looks["well"]()
    with pytest.raises(machine.Worse) as worse:
        looks["again"]()
    assert worse.value.evidence.endswith("was started again once: again ended with status 3: it printed nothing")
    assert worse.value.remedy == f"see {tmp_path}/again.log"
    with pytest.raises(
        errors.UnavailableError, match=r"^gave up since .*: dead ended with status 4: it printed nothing$"
    ):
        looks["dead"]()
    for name, state in (("starts", "starting"), ("waits", "waiting")):
        with pytest.raises(machine.Worse) as worse:
            looks[name]()
        assert worse.value.evidence.startswith(f"{state} since ")


async def test_a_node_of_an_earlier_version_is_no_fault(tmp_path: Path) -> None:
    layout = config.Layout(str(tmp_path / "data"), str(tmp_path))
    listening = unixsocket.listen(layout.control_socket)
    interface = varlink.Interface(nodeaddress.INTERFACE, "", {})
    async with varlink.serve(listening, [interface]):
        looks = await asyncio.to_thread(running.looks, layout)
    with pytest.raises(machine.Worse, match="GetChildren") as worse:
        looks["node"]()
    assert worse.value.remedy


def test_a_child_is_well_again_some_time_after_it_was_started_again() -> None:
    def told(state: str, seconds: float) -> str:
        child = {
            "name": "x",
            "pid": 7,
            "state": state,
            "since": time.time() - seconds,
            "restarts": 2,
            "failure": "it died",
        }
        return running._look({**child, "log": "/log"})

    with pytest.raises(machine.Worse, match=r"was started again 2 times: it died$"):
        told("ready", 3000)
    assert told("ready", 4000).startswith("process 7, ready since 2")
    assert told("ready", 4000).endswith("was started again 2 times")
    with pytest.raises(machine.Worse, match=r"^stopping since .*: it died$"):
        told("stopping", 4000)
    for state in ("died", "gave up", "stopped"):
        with pytest.raises(errors.UnavailableError, match=rf"^{state} since .*: it died$"):
            told(state, 4000)
