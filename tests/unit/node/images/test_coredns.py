import os
from pathlib import Path

from nixlet.node.images import coredns


def test_a_program_is_the_same_after_a_boot_that_numbers_devices_otherwise(tmp_path: Path) -> None:
    program = tmp_path / "coredns"
    program.write_text("1")
    now = program.stat()
    fields = list(now)
    fields[2] = now.st_dev + 1
    # (what a sequence has not: the nanoseconds)
    later = os.stat_result(fields, {"st_mtime_ns": now.st_mtime_ns})
    assert later.st_dev != now.st_dev
    assert coredns._origin(str(program), later) == coredns._origin(str(program), now)
    os.utime(program, ns=(1, 1))
    assert coredns._origin(str(program), program.stat()) != coredns._origin(str(program), now)
