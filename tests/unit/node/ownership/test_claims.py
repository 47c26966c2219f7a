"""Two nodes of one host have no pod network in common."""

from pathlib import Path

import pytest

from nixlet import errors
from nixlet.node.ownership import claims


@pytest.mark.parametrize(
    ("bridge", "pod_cidr", "what"),
    [
        ("nixlet0", "10.63.0.0/16", "has the bridge nixlet0"),
        ("nixlet0", "10.64.0.0/16", "has the bridge nixlet0"),
        ("other0", "10.63.7.0/24", "has addresses of 10.63.7.0/24"),
        ("other0", "10.0.0.0/8", "has addresses of 10.0.0.0/8"),
    ],
)
def test_the_second_is_refused_with_the_flags_to_change(tmp_path: Path, bridge: str, pod_cidr: str, what: str) -> None:
    directory = str(tmp_path / "networks")
    with claims.pod_network("nixlet0", "10.63.0.0/16", directory):
        with (
            pytest.raises(errors.FailedPreconditionError, match=what) as caught,
            claims.pod_network(bridge, pod_cidr, directory),
        ):
            pass
        assert "--bridge and --pod-cidr" in caught.value.hint
        with (
            claims.pod_network("other0", "10.64.0.0/16", directory),
            claims.pod_network("six0", "fd00::/64", directory),
        ):
            pass
    # Who is gone has nothing.
    with claims.pod_network(bridge, pod_cidr, directory):
        pass
