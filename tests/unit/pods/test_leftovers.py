"""Which processes belong to containers that nobody looks after."""

import pytest

from nixlet.pods import leftovers

OURS, OTHER = "0a" * 32, "1b" * 32


@pytest.mark.parametrize(
    ("cgroups", "ours"),
    [
        (f"0::/k8s.io/{OURS}\n", True),
        (f"0::/k8s.io/{OURS}/init\n", True),
        (f"12:pids:/k8s.io/{OURS}\n0::/\n", True),
        (f"0::/system.slice/cri-containerd-{OURS}.scope\n", True),
        (f"0::/kubepods.slice/cri-containerd-{OURS}.scope/container\n", True),
        (f"0::/kubepods.slice/cri-containerd-{OTHER}.scope\n", False),
        (f"0::/user.slice/x-{OURS}\n", False),
        (f"0::/k8s.io/{OURS}0\n", False),
        ("0::/system.slice/-.scope\n", False),
        ("0::/\n", False),
    ],
)
def test_what_runs_in_a_containers_cgroup(cgroups: str, *, ours: bool) -> None:
    assert leftovers._names(cgroups, {OURS}) == ours
