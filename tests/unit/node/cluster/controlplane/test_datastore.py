"""What is said where a cluster's state has no room; by real programs and disks: system/test_cluster_disk.py."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.kubeclient.endpoint import Endpoint
from nixlet.node.cluster.controlplane import datastore

FULL = "{} is full, and the cluster takes no changes until there is room"


@pytest.mark.parametrize(
    "said",
    [
        "C | mvcc/backend: cannot commit tx (write /db: no space left on device)",
        '{"level":"fatal","error":"write /wal/0.tmp: disk quota exceeded"}',
        'level=fatal msg="Error: building kine: setup db: database or disk is full"',
    ],
)
def test_a_disk_that_was_full_is_the_cause(tmp_path: Path, said: str) -> None:
    assert (
        datastore.cause(str(tmp_path), f"starting\n{said}\ngoroutine 1")
        == f"the file system of {FULL.format(tmp_path)}"
    )
    assert datastore.cause(str(tmp_path), "panic: something else") == ""
    assert datastore.cause(str(tmp_path / "missing"), "killed") == ""


def test_kine_needs_more_room_than_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datastore.check_room_for_kine(str(tmp_path))
    datastore.check_room_for_kine(str(tmp_path / "missing"))
    left = os.statvfs_result((4096, 4096, 1 << 20, 2000, 2000, 1000, 1000, 1000, 0, 255))
    monkeypatch.setattr("os.statvfs", lambda _: left)
    assert datastore.cause(str(tmp_path), "killed") == ""
    assert datastore.cause(str(tmp_path), "killed", kine=True) == f"the file system of {FULL.format(tmp_path)}"
    with pytest.raises(
        errors.ResourceExhaustedError, match="has 7 MiB left, and kine is not started with less than 32"
    ):
        datastore.check_room_for_kine(str(tmp_path))
    # A file system that counts nothing has room, as far as anybody knows.
    uncounted = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr("os.statvfs", lambda _: uncounted)
    datastore.check_room_for_kine(str(tmp_path))


class Etcd(ThreadingHTTPServer):
    """Speaks etcd's gateway, and answers as a test wants it: a real one gives no wrong answers."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        self.asked: list[tuple[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body))
                status, answer = outer.answers.get(self.path, (200, {}))
                text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with Etcd() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def relief(etcd: Etcd) -> datastore.Relief:
    return datastore.Relief(Endpoint.of(f"http://127.0.0.1:{etcd.server_port}", what="etcd"))


ALARM = {"alarms": [{"memberID": "17972106040042161359", "alarm": "NOSPACE"}, {"memberID": "1", "alarm": "CORRUPT"}]}
STATUS = {"header": {"revision": "7"}, "dbSize": str(3 << 20)}


async def test_an_etcd_that_is_well_is_left_alone(etcd: Etcd) -> None:
    made = relief(etcd)
    await made.look()
    assert made.remark() == ""
    assert etcd.asked == [("/v3/maintenance/alarm", {"action": "GET"})]


async def test_an_alarm_is_taken_away_when_the_database_is_smaller(etcd: Etcd) -> None:
    etcd.answers = {
        "/v3/maintenance/alarm": (200, ALARM),
        "/v3/maintenance/status": (200, STATUS),
        # (it has been compacted already)
        "/v3/kv/compaction": (400, {"code": 11, "message": "etcdserver: mvcc: required revision has been compacted"}),
    }
    made = relief(etcd)
    await made.look()
    assert "from 3 MiB to 3 MiB" in made.remark()
    assert [path.rpartition("/")[2] for path, _ in etcd.asked] == [
        "alarm", "status", "compaction", "defragment", "status", "alarm",
    ]  # fmt: skip
    assert etcd.asked[2][1] == {"revision": "7", "physical": True}
    # One that says that its data are damaged is none of ours.
    gone = {"action": "DEACTIVATE", "memberID": "17972106040042161359", "alarm": "NOSPACE"}
    assert etcd.asked[-1][1] == gone
    etcd.answers = {}
    await made.look()
    assert made.remark() == ""


@pytest.mark.parametrize("answer", [(200, b"<html>"), (403, {"message": "etcdserver: permission denied"})])
async def test_an_answer_that_is_none_is_told(etcd: Etcd, answer: tuple[int, Any]) -> None:
    etcd.answers = {"/v3/maintenance/alarm": answer}
    made = relief(etcd)
    await made.look()
    assert made.remark().startswith("whether etcd's database has room isn't known: ")
    assert len(etcd.asked) == 1


@pytest.mark.parametrize("status", [500, 503])
async def test_a_database_that_can_not_be_made_smaller_is_told(etcd: Etcd, status: int) -> None:
    """It takes as much room on the disk once more; and whatever it is, the alarm is known by then."""
    etcd.answers = {
        "/v3/maintenance/alarm": (200, ALARM),
        "/v3/maintenance/status": (200, STATUS),
        "/v3/maintenance/defragment": (status, {"code": 2, "message": "write db.tmp: no space left on device"}),
    }
    made = relief(etcd)
    await made.look()
    assert made.remark() == (
        "etcd's database has reached its quota, and can't be made smaller; the cluster takes no changes but deletions:"
        " write db.tmp: no space left on device"
    )
    # The alarm stays: etcd would raise it again.
    assert [path.rpartition("/")[2] for path, _ in etcd.asked] == ["alarm", "status", "compaction", "defragment"]


async def test_an_etcd_that_is_not_up_is_told_elsewhere(etcd: Etcd) -> None:
    etcd.answers = {"/v3/maintenance/alarm": (503, {"message": "no leader"})}
    made = relief(etcd)
    await made.look()
    assert made.remark() == ""
