"""What a cluster was made with can't be changed under it unnoticed."""

import ipaddress
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.node.cluster.preflight import made
from nixlet.node.settings import config
from support import clusters


@pytest.fixture
def layout(tmp_path: Path) -> config.Layout:
    (tmp_path / "data/server/db").mkdir(parents=True)
    return config.Layout(f"{tmp_path}/data", f"{tmp_path}/run")


def chosen(layout: config.Layout, **said: Any) -> str:
    settings = config.Settings(data_dir=layout.data_dir, state_dir=layout.state_dir, **said)
    return made.chosen(settings, with_kine=True, with_etcd=True)


def remember(layout: config.Layout, datastore: str, **said: Any) -> None:
    cluster = clusters.settings(Path(layout.data_dir).parent)
    made.remember(config.Settings(data_dir=layout.data_dir, **said), datastore, cluster)
    assert Path(made.memory(layout)).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("there", "said", "flag"),
    [
        ("state.db", {"cluster_init": True}, "--cluster-init"),
        ("state.db", {"datastore_endpoint": "postgres://u:se-cret@db"}, "--datastore-endpoint"),
        ("etcd/member", {"datastore_endpoint": "https://se-cret:2379"}, "--datastore-endpoint"),
        ("etcd/member", {"datastore_endpoint": "sqlite://"}, "--datastore-endpoint"),
    ],
)
def test_a_cluster_does_not_begin_empty_beside_its_state(
    layout: config.Layout, there: str, said: dict[str, Any], flag: str
) -> None:
    path = Path(layout.data_dir, "server/db", there)
    path.mkdir(parents=True)
    with pytest.raises(errors.FailedPreconditionError) as caught:
        chosen(layout, **said)
    assert caught.value.message.endswith(f"is in {path}, and with {flag} it would begin empty")
    assert "se-cret" not in f"{caught.value} {caught.value.hint}"
    # Whoever has moved it away has been told what that means.
    remember(layout, made.KINE if there == "state.db" else made.ETCD)
    path.rmdir()
    chosen(layout, **said)


def test_a_state_that_is_gone_is_not_begun_anew(layout: config.Layout) -> None:
    """A disk that isn't mounted, for one, also where its place is there; or a file that lost what it had."""
    etcd, sqlite = (Path(layout.data_dir, "server/db", name) for name in ("etcd/member", "state.db"))
    for datastore, path, more in ((made.ETCD, etcd, {"cluster_init": True}), (made.KINE, sqlite, {})):
        path.mkdir(parents=True)
        remember(layout, datastore)
        assert chosen(layout) == datastore
        path.rmdir()
        if datastore == made.KINE:
            path.touch()
        for said in ({}, more):
            with pytest.raises(
                errors.FailedPreconditionError, match=f"^{path} is missing, or empty, in which the state"
            ) as lost:
                chosen(layout, **said)
            assert f"or remove {made.memory(layout)} to begin an empty cluster" in lost.value.hint
    Path(made.memory(layout)).unlink()
    assert chosen(layout) == made.KINE


def test_a_state_elsewhere_is_not_forgotten(layout: config.Layout) -> None:
    remember(layout, made.KINE, datastore_endpoint="mysql://u:se-cret@db")
    assert "se-cret" not in Path(made.memory(layout)).read_text()
    # By the record that is in it, it is known again wherever it has moved.
    assert (found := made.remembered(layout)) is not None
    assert found.recorded
    assert chosen(layout, datastore_endpoint="mysql://db2") == made.KINE
    for said in ({}, {"cluster_init": True}, {"datastore_endpoint": "sqlite://"}):
        with pytest.raises(errors.FailedPreconditionError, match="is at a datastore-endpoint, and none is given"):
            chosen(layout, **said)
    assert chosen(layout, server="https://s") == made.ELSEWHERE


def test_networks_stay_or_grow(layout: config.Layout, tmp_path: Path) -> None:
    def check(**changes: Any) -> None:
        made.check_networks(clusters.settings(tmp_path, **changes))

    def nets(*texts: str) -> Any:
        return tuple(ipaddress.ip_network(text) for text in texts)

    check(service_cidrs=nets("10.53.0.0/16"))
    remember(layout, made.ETCD)
    check()
    check(cluster_cidrs=nets("10.40.0.0/14"))
    check(service_cidrs=nets("10.43.0.0/16", "fd00::/112"))
    for flag, changes in (
        ("--cluster-cidr 10.42.0.0/16", {"cluster_cidrs": nets("10.52.0.0/16")}),
        ("--cluster-cidr 10.42.0.0/16", {"cluster_cidrs": nets("10.42.0.0/17")}),
        ("--service-cidr 10.43.0.0/16", {"service_cidrs": nets("10.53.0.0/16")}),
        # The API server's own address would be another one.
        ("--service-cidr 10.43.0.0/16", {"service_cidrs": nets("10.42.0.0/15")}),
        ("--service-cidr 10.43.0.0/16", {"service_cidrs": nets("fd00::/112", "10.43.0.0/16")}),
    ):
        with pytest.raises(errors.FailedPreconditionError, match=f"was made with {flag}, and what has addresses"):
            check(**changes)


@pytest.mark.parametrize("text", ["{", "{}", '{"state":1}'])
def test_a_damaged_memory_is_told(layout: config.Layout, text: str) -> None:
    path = Path(made.memory(layout))
    path.write_text(text)
    with pytest.raises(errors.FailedPreconditionError, match=f"{path} doesn't say what the cluster was made with"):
        chosen(layout)
