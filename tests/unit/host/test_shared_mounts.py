"""Whether the machine's mounts are seen elsewhere, by tables of our own (proc_pid_mountinfo(5))."""

from pathlib import Path

import pytest

from nixlet.host import mounts

OTHERS = "22 27 0:21 / /proc rw,relatime shared:5 - proc proc rw\n"


@pytest.mark.parametrize(
    ("line", "shared"),
    [
        ("27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n", True),
        ("27 1 254:0 / / rw,relatime master:3 shared:1 - ext4 /dev/vda rw\n", True),
        ("27 1 254:0 / / rw,relatime master:3 - ext4 /dev/vda rw\n", False),
        ("27 1 254:0 / / rw - ext4 shared:1 rw\n", False),
        ("", False),
    ],
)
def test_what_the_root_says(tmp_path: Path, line: str, shared: bool) -> None:
    (tmp_path / "mountinfo").write_text(OTHERS + line)
    assert mounts.are_shared(f"{tmp_path}/mountinfo") is shared
