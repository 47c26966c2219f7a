"""The everyday verbs: run, ps, logs, stop, rm, images."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from support import nodes, storeimages


@pytest.fixture
def image(any_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]) -> str:
    return store_images[50].reference


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_the_exit_status_is_the_containers(any_node: nodes.Node, image: str, code: int) -> None:
    done = any_node.run("run", "--rm", image, "--", "/bin/sh", "-c", f"echo out; echo err >&2; exit {code}")
    assert (done.returncode, done.stdout) == (code, b"out\n")
    assert done.stderr.splitlines()[-1] == b"err"
    assert json.loads(any_node.ok("ps", "-a", "--output", "json")) == []


def test_a_signal_gives_128_and_its_number(any_node: nodes.Node, image: str) -> None:
    argv = [sys.executable, "-m", "nixlet", "run", "--rm", "--name", "killed", image, "/bin/sleep", "1000"]
    with subprocess.Popen(argv, env=any_node.environment) as process:
        for _ in range(200):
            if any_node.ok("ps", "-q"):
                break
            time.sleep(0.02)
        any_node.ok("stop", "-t", "0", "killed")
        assert process.wait(30) == 137


def test_what_has_ended_in_front_is_not_running_for_anybody(any_node: nodes.Node, image: str) -> None:
    for _ in range(10):
        assert any_node.run("run", "--name", "ended", image, "--", "/bin/true").returncode == 0
        assert any_node.ok("ps", "-q") == ""
        any_node.ok("rm", "ended")


def test_a_missing_command_gives_127_and_one_that_cannot_run_126(any_node: nodes.Node, image: str) -> None:
    missing = any_node.run("run", "--rm", image, "--", "/bin/no-such-command")
    assert missing.returncode == 127
    assert b"/bin/no-such-command is not in the image" in missing.stderr
    unfit = any_node.run("run", "--rm", image, "--", "/bin")
    assert unfit.returncode == 126
    assert json.loads(any_node.ok("ps", "-a", "--output", "json")) == []


def test_dollar_signs_reach_the_container(any_node: nodes.Node, image: str) -> None:
    output = any_node.ok(
        "run", "--rm", "-e", "A=$(PATH)$$", image, "--", "/bin/sh", "-c", 'echo "$A $(echo x) $((1+1))"'
    )
    assert output == "$(PATH)$$ x 2\n"


def test_a_path_on_the_command_line_is_an_image(
    any_node: nodes.Node, tmp_path: Path, store_images: dict[int, storeimages.StoreImage], hello: str
) -> None:
    link = tmp_path / "result"
    link.symlink_to(hello.removeprefix("nix:0"))
    assert any_node.ok("run", "--rm", str(link)) == "Hello, world!\n"


def test_logs_of_what_has_ended_and_of_what_goes_on(any_node: nodes.Node, image: str) -> None:
    any_node.ok("run", "--name", "done", image, "--", "/bin/sh", "-c", "printf 'one\\ntwo'")
    assert any_node.ok("logs", "done") == "one\ntwo"
    assert any_node.ok("logs", "-t", "done").startswith("20")
    any_node.ok("rm", "done")
    any_node.ok("run", "-d", "--name", "going", image, "--", "/bin/sh", "-c", "echo a; sleep 1; echo b")
    assert any_node.ok("logs", "-f", "going") == "a\nb\n"
    any_node.ok("rm", "going")


def test_logs_end_with_their_reader(any_node: nodes.Node, image: str) -> None:
    any_node.ok(
        "run", "-d", "--name", "endless", image, "--", "/bin/sh", "-c", "while :; do echo tick; sleep 0.05; done"
    )
    argv = [sys.executable, "-m", "nixlet", "logs", "-f", "endless"]
    try:
        with subprocess.Popen(
            argv, env=any_node.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"tick\n"
            process.stdout.close()
            assert process.wait(30) == 141
            assert process.stderr.read() == b""
        # What removes something does so, whoever reads of it.
        script = 'exec "$@" >&-'
        done = subprocess.run(
            ["sh", "-c", script, "sh", sys.executable, "-m", "nixlet", "rm", "-f", "endless"],
            env=any_node.environment, capture_output=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")
        assert any_node.ok("ps", "-aq") == ""
    finally:
        any_node.remove_all_pods()
    assert (
        any_node.run("run", "--rm", "-h", "front.example", image, "--", "/bin/cat", "/etc/hostname").stdout
        == b"front.example\n"
    )


def test_containers_are_found_by_name_and_by_the_beginning_of_their_id(any_node: nodes.Node, image: str) -> None:
    container = any_node.ok("run", "-d", "--name", "named", image, "--", "/bin/sleep", "1000").strip()
    assert any_node.ok("ps", "-q").split() == [container]
    refused = any_node.run("rm", "named")
    assert refused.returncode == 125
    assert b"container named is running" in refused.stderr
    twice = any_node.run("run", "--name", "named", image)
    assert twice.returncode == 125
    assert b"there is a pod named already" in twice.stderr
    any_node.ok("stop", "-t", "0", container[:12])
    any_node.ok("rm", container[:12])
    missing = any_node.run("rm", "named")
    assert (missing.returncode, b"there is no container named" in missing.stderr) == (125, True)


def test_images_are_listed(any_node: nodes.Node, hello: str) -> None:
    any_node.ok("run", "--rm", hello)
    names = [name for each in json.loads(any_node.ok("images", "--output", "json")) for name in each["names"]]
    assert f"{hello}:latest" in names
    assert "nix-image-hello.tar" in any_node.ok("images")


def test_progress_on_a_terminal(any_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]) -> None:
    """On a terminal progress is drawn, and gone when the output comes."""
    argv = [
        sys.executable,
        "-m",
        "nixlet",
        "run",
        "--rm",
        "--pull",
        "always",
        store_images[500].reference,
        "/bin/echo",
        "out",
    ]
    script = ["script", "--quiet", "--return", "--command", " ".join(argv), "/dev/null"]
    done = subprocess.run(script, env={**any_node.environment, "TERM": "xterm"}, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert b"pulling nix-image-500-closure.tar" in done.stdout
    assert b"\x1b[" in done.stdout
    assert done.stdout.rstrip().endswith(b"out")


def test_system_calls_are_filtered_unless_somebody_says_otherwise(
    node: nodes.Node, store_images: dict[int, storeimages.StoreImage], tmp_path: Path
) -> None:
    profile = tmp_path / "profile.json"
    refused = {"names": ["uname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [refused]}))

    def seccomp(*options: str) -> str:
        text = node.ok("run", "--rm", *options, store_images[50].reference, "--", "/bin/cat", "/proc/self/status")
        return next(line.split()[1] for line in text.splitlines() if line.startswith("Seccomp:"))

    assert seccomp() == "2"
    assert seccomp("--security-opt", "seccomp=unconfined") == "0"
    assert seccomp("--privileged") == "0"
    own = ["--security-opt", f"seccomp={profile}"]
    assert seccomp(*own) == "2"
    assert "Linux" not in node.ok("run", "--rm", *own, store_images[50].reference, "--", "/bin/busybox", "uname")


def test_capabilities_are_taken_away_whatever_they_are_called(
    node: nodes.Node, store_images: dict[int, storeimages.StoreImage]
) -> None:
    image = store_images[50].reference
    command = ["/bin/cat", "/proc/self/status"]
    dropping = nodes.manifest("drops", image, command=command, container={"securityContext": {"capabilities": {"drop": ["CAP_NET_RAW"]}}})  # fmt: skip

    def bounding(text: str) -> int:
        return next(int(line.split()[1], 16) for line in text.splitlines() if line.startswith("CapBnd:"))

    net_raw, sys_time = 1 << 13, 1 << 25
    assert bounding(node.ok("run", "--rm", image, "--", *command)) & (net_raw | sys_time) == net_raw
    assert not bounding(node.ok("kube", "play", "--wait", "-", stdin=dropping)) & net_raw
    changed = ["--cap-drop", "all", "--cap-add", "cap_sys_time"]
    assert bounding(node.ok("run", "--rm", *changed, image, "--", *command)) == sys_time


def test_users_are_those_of_the_image_and_of_the_manifest(
    node: nodes.Node, store_images: dict[int, storeimages.StoreImage]
) -> None:
    """The image has no passwd, as most that Nix makes."""
    image = store_images[50].reference

    def run_by(security: dict[str, object]) -> "subprocess.CompletedProcess[bytes]":
        manifest = nodes.manifest("who", image, command=["/bin/busybox", "id"], securityContext=security)
        return node.run("kube", "play", "--wait", "-", stdin=manifest)

    assert node.ok("run", "--rm", "-u", "root", image, "--", "/bin/busybox", "id") == "uid=0 gid=0 groups=0\n"
    unknown = node.run("run", "--rm", "-u", "www", image, "--", "/bin/busybox", "id")
    assert unknown.returncode == 125
    assert b"can't start: its image has no user www\nhint: give the number of one" in unknown.stderr
    assert run_by({"runAsGroup": 5}).stdout == b"uid=0 gid=5 groups=5\n"
    assert run_by({"runAsUser": 7, "runAsNonRoot": True}).stdout == b"uid=7 gid=0 groups=0\n"
    refused = run_by({"runAsNonRoot": True})
    assert (refused.returncode, b"its image runs as root" in refused.stderr) == (125, True)
    nodes.until(lambda: node.crictl("pods", "-q") == "", "nothing of them is left")


def test_interrupting_run_removes_the_container(any_node: nodes.Node, image: str) -> None:
    argv = [sys.executable, "-m", "nixlet", "run", "--rm", image, "--", "/bin/sh", "-c", "echo up; exec sleep 1000"]
    with subprocess.Popen(argv, env=any_node.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(2)
        assert process.wait(30) == 130
    assert json.loads(any_node.ok("ps", "-a", "--output", "json")) == []


def test_kube_play_and_down(any_node: nodes.Node, image: str) -> None:
    manifest = nodes.manifest(
        "web",
        image,
        command=["/bin/sh", "-c", "cat /data/file; exec sleep 1000"],
        restartPolicy="Always",
        volumes=[{"name": "data", "emptyDir": {}}],
        initContainers=[
            {
                "name": "first",
                "image": image,
                "command": ["/bin/sh", "-c", "echo made by init > /data/file"],
                "volumeMounts": [{"name": "data", "mountPath": "/data"}],
            }
        ],
        container={"volumeMounts": [{"name": "data", "mountPath": "/data", "readOnly": True}]},
    )
    played = any_node.run("kube", "play", "-", stdin=manifest)
    assert (played.returncode, played.stdout) == (0, b"pod/web\n")
    assert b"nothing restarts its containers without a kubelet" in played.stderr
    for _ in range(100):
        if any_node.ok("logs", "web/main"):
            break
        time.sleep(0.05)
    assert any_node.ok("logs", "web/main") == "made by init\n"
    again = any_node.run("kube", "play", "-", stdin=manifest)
    assert again.returncode == 125
    (before,) = json.loads(any_node.ok("ps", "-o", "json"))
    elsewhere = nodes.manifest("web", "nowhere.invalid/none:1", container={"imagePullPolicy": "Never"})
    refused = any_node.run("kube", "play", "--replace", "-", stdin=elsewhere)
    assert (refused.returncode, b"is not here" in refused.stderr) == (125, True)
    # What can't be replaced stays.
    assert [row["id"] for row in json.loads(any_node.ok("ps", "-o", "json"))] == [before["id"]]
    any_node.ok("kube", "play", "--replace", "-", stdin=manifest)
    assert [row["id"] for row in json.loads(any_node.ok("ps", "-o", "json"))] != [before["id"]]
    assert (
        any_node.ok(
            "kube", "down", "-", stdin=manifest.replace(b'"spec": {', b'"spec": {"terminationGracePeriodSeconds": 1, ')
        )
        == "pod/web removed\n"
    )
    missing = any_node.run("kube", "down", "-", stdin=manifest)
    assert (missing.returncode, b"there is no pod web" in missing.stderr) == (125, True)


def test_the_exit_status_of_play_is_that_of_the_container_that_fails(any_node: nodes.Node, image: str) -> None:
    manifest = nodes.manifest("fails", image, command=["/bin/sh", "-c", "exit 9"])
    assert any_node.run("kube", "play", "--wait", "-", stdin=manifest).returncode == 9


def test_pods_that_run_are_told_although_a_later_one_does_not(any_node: nodes.Node, image: str) -> None:
    good = nodes.manifest("good", image, command=["/bin/busybox", "sleep", "100"])
    bad = nodes.manifest("bad", image, command=["/nowhere"])
    for output, told in (((), "pod/good\n"), (("-o", "json"), "good")):
        played = any_node.run("kube", "play", *output, "-", stdin=good + b"\n---\n" + bad)
        printed = played.stdout.decode()
        assert (played.returncode, json.loads(printed)[0]["name"] if output else printed) == (127, told)
        any_node.ok("kube", "down", "-", stdin=good)


def test_pulls_of_one_image_by_many_at_once(
    any_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]
) -> None:
    image = store_images[500].reference
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(any_node.crictl("pull", image))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert len(set(results)) == 1
