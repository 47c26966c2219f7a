"""Running a benchmark with small numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nixlet.host import mounts
from support import parts

_ROOT = Path(__file__).parents[2]


def figures(name: str, directory: Path) -> Any:
    """Run a benchmark of bench/ through, and see that it leaves nothing; its figures."""
    families = "".join(f"{family} {place}\n" for family, place in parts.directories().items())
    environment = {**os.environ, "PYTHONPATH": f"{_ROOT}/tests:{_ROOT}/bench", "NIXLET_PARTS": families}
    argv = [sys.executable, f"{_ROOT}/bench/{name}.py", "--quick", "--json", f"{directory}/figures.json"]
    done = subprocess.run(argv, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Others mount as well meanwhile; what a benchmark mounts lies below directories of its own.
    assert [entry.path for entry in mounts.table() if f"nixlet-{name}-" in entry.path] == []
    assert not any(Path(f"/run/nixlet-test/{place}").exists() for place in ("b", "15", "16", "17", "18"))
    return json.loads((directory / "figures.json").read_text())["figures"]
