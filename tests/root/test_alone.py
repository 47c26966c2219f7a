"""scripts/alone: tests that have the machine for themselves beside others that have it, too."""

import contextlib
import fcntl
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_who_runs_alone_sees_nothing_of_others_and_leaves_nothing(tmp_path: Path) -> None:
    seconds = f"100000.{os.getpid()}"
    for place in ("/run/nixlet-test", "/tmp/nixlet-test-images"):
        Path(place).mkdir(exist_ok=True)
    script = f"""
        echo $(ls /sys/class/net); test -e /sys/fs/cgroup && echo cgroups
        flock -n /run/nixlet-test.lock echo ours; echo $(ls -A /run/nixlet-test /tmp/nixlet-test-images)
        touch /run/nixlet-test/from-inside /tmp/nixlet-test-images/from-inside
        sleep {seconds} & echo "$1"; exit 7
    """
    argv = [str(ROOT / "scripts/alone"), "sh", "-c", script, "sh", "a  b"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with open("/run/nixlet-test.lock", "wb") as lock:
        # Somebody has it: these tests or others.
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 7
    assert done.stdout == "lo\ncgroups\nours\n/run/nixlet-test: /tmp/nixlet-test-images:\na  b\n"
    assert list(tmp_path.iterdir()) == []
    assert not Path("/run/nixlet-test/from-inside").exists()
    assert not Path("/tmp/nixlet-test-images/from-inside").exists()
    assert seconds not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
