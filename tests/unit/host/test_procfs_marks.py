"""Processes that are told apart, also when a number is used again."""

import os
import subprocess

from nixlet.host import procfs


def test_a_process_is_gone_when_it_surely_is() -> None:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as child:
        mark = procfs.mark_of(child.pid)
        assert not procfs.is_gone(mark)
        child.communicate()
    assert procfs.is_gone(mark)
    boot, namespace, pid, started = procfs.mark_of(os.getpid()).split("/")
    assert procfs.is_gone(f"{boot}/{namespace}/{pid}/1")
    assert procfs.is_gone(f"another-boot/{namespace}/{pid}/{started}")
    # Nothing is known of these.
    for unknown in (
        "",
        "/",
        "what/is/this",
        f"{boot}/pid:[1]/{pid}/1",
        f"{boot}/{namespace}/x/1",
    ):
        assert not procfs.is_gone(unknown)
