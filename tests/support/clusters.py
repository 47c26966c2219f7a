"""Settings of clusters that nothing runs of."""

import dataclasses
import datetime
import ipaddress
from pathlib import Path
from typing import Any

from nixlet.cluster.settings import ClusterSettings

NOW = datetime.datetime(2026, 11, 28, 12, 0, 0, 5, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)


def settings(directory: Path, **changes: Any) -> ClusterSettings:
    """A server with one address, changed as wanted."""
    plain = ClusterSettings(
        str(directory / "data"), str(directory / "run"), "node-1", (ipaddress.ip_address("192.0.2.7"),)
    )
    return dataclasses.replace(plain, **changes)


def content(directory: Path) -> dict[str, tuple[bytes, int]]:
    """What is in the files below a directory, and when it was written; locks say who has them."""
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
