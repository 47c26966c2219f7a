"""Other nodes of Kubernetes on a machine are known by their programs."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nixlet.node.cluster.preflight import others

ALL = {"kubelet": others.KUBELET, "proxy": others.PROXY, "flannel": others.FLANNEL}


@pytest.mark.parametrize(
    ("cmdline", "found"),
    [
        (b"flanneld\0", ["flannel"]),
        (b"/opt/bin/flanneld\0--kube-subnet-mgr\0", ["flannel"]),
        (b"/opt/my programs/kubelet\0--v=2\0", ["kubelet"]),
        # Whole nodes in one process; k3s writes its command line anew.
        (b"/usr/local/bin/k3s server\0\0\0", list(ALL)),
        (b"/usr/local/bin/k3s\0agent\0--server\0", list(ALL)),
        (b"/snap/microk8s/1/kubelite\0", list(ALL)),
        # Its clients, and what only looks like it.
        (b"/usr/local/bin/k3s\0kubectl\0server\0", []),
        (b"k3s\0", []),
        (b"my-kubelet\0", []),
        (b"vi\0kubelet\0", []),
        (b"", []),
    ],
)
def test_who_is_at_work(cmdline: bytes, found: list[str]) -> None:
    assert [name for name, program in ALL.items() if others._does(program, cmdline)] == found


@contextlib.asynccontextmanager
async def running(*argv: str, name: str) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(*argv, executable=shutil.which(argv[0].rpartition("/")[2]))
    try:
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(name.encode()):
            assert process.returncode is None
            await asyncio.sleep(0.01)
        yield
    finally:
        process.kill()
        await process.wait()


async def test_what_runs_in_another_network_is_not_here() -> None:
    # (tests beside this one have processes of the real names)
    odd = "a-program-of-this-test"
    apart = ("unshare", "--user", "--map-root-user", "--net", "bash", "-c", f"exec -a {odd} sleep 60")
    async with running(*apart, name=odd):
        assert others.run(odd.encode())
        assert not others.run(odd.encode(), here=True)
    async with running("bash", "-c", f"exec -a {odd} sleep 60", name=odd):
        assert others.run(odd.encode(), here=True)
    assert not others.run(odd.encode())
