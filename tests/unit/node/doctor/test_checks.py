"""What becomes of a check that can't look: it says so, and the others are told all the same."""

import asyncio
import errno

import pytest

from nixlet.node.doctor import checks


async def found(error: OSError) -> checks.Finding:
    def look() -> str:
        raise error

    return await checks.Check("containerd", "snapshotter", look).find()


async def test_what_the_file_system_refuses() -> None:
    finding = await found(OSError(errno.EROFS, "Read-only file system", "/data/x"))
    assert (finding.status, finding.evidence) == ("unknown", "/data/x can't be used: Read-only file system")
    finding = await found(OSError(errno.ENOSPC, "No space left on device", "/data/x"))
    assert finding.status == "unknown"
    assert "make room" in finding.remedy
    finding = await found(PermissionError(errno.EACCES, "Permission denied", "/data/x"))
    assert (finding.status, finding.remedy) == ("unknown", "run it as root: sudo nixlet doctor")


async def test_what_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_PATIENCE", 0.01)

    async def look() -> str:
        await asyncio.sleep(3600)
        return ""

    finding = await checks.Check("containerd", "pods' network", look).find()
    assert (finding.status, finding.evidence) == ("unknown", "no answer within 0.01 s")
