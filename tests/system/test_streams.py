"""Input, output, terminals and signals of containers: run, exec, attach."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import nodes, storeimages, terminals

pytestmark = pytest.mark.slow

DATA = bytes(range(256)) * 1000 + b"\r\n\n\r"


@pytest.fixture
def image(store_images: dict[int, storeimages.StoreImage]) -> str:
    return store_images[50].reference


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a failed test leaves must not fail the next ones."""
    yield
    used: nodes.Node = request.getfixturevalue("node" if "node" in request.fixturenames else "any_node")
    left = used.ok("ps", "-aq").split()
    if left:
        used.ok("rm", "-f", *left)


@contextlib.contextmanager
def background(node: nodes.Node, image: str, *arguments: str, options: tuple[str, ...] = ()) -> Iterator[str]:
    """A container that sleeps, or does something else."""
    node.ok("run", "-d", "--name", "background", *options, image, "--", *(arguments or ("/bin/sleep", "1000")))
    try:
        yield "background"
    finally:
        node.ok("rm", "-f", "background")


def test_input_ends_in_every_containerd(node: nodes.Node, image: str) -> None:
    """And every byte goes through in both directions, which a log of lines would not hold."""
    done = node.run("run", "--rm", "-i", image, "--", "/bin/cat", stdin=DATA)
    assert (done.returncode, done.stdout) == (0, DATA), done.stderr
    with background(node, image) as container:
        done = node.run("exec", "-i", container, "/bin/cat", stdin=DATA)
        assert (done.returncode, done.stdout) == (0, DATA), done.stderr
        done = node.run("exec", container, "/bin/sh", "-c", "echo out; echo err >&2; exit 7")
        assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert not list(node.state_dir.glob("exec-*"))


def test_terminals_in_every_containerd(node: nodes.Node, image: str) -> None:
    with terminals.running(
        ["run", "--rm", "-it", image, "--", "/bin/sh", "-c", "printf '? '; read a; echo got $a; exit 4"],
        node.environment,
    ) as terminal:
        terminal.wait_for(b"? ")
        terminal.press(b"this\r")
        terminal.wait_for(b"got this\r\n")
        assert terminal.end() == 4
    with (
        background(node, image) as container,
        terminals.running(["exec", "-it", container, "/bin/sh"], node.environment) as terminal,
    ):
        terminal.wait_for(b"# ")
        terminal.press(b"exit 6\r")
        assert terminal.end() == 6


def test_attach_in_every_containerd(node: nodes.Node, image: str) -> None:
    loop = "while read line; do echo got $line; [ $line = end ] && exit 5; done"
    with background(node, image, "/bin/sh", "-c", loop, options=("-i",)) as container:
        for text, code in ((b"one\n", None), (b"two\nend\n", 5)):
            argv = [sys.executable, "-m", "nixlet", "attach", container]
            with subprocess.Popen(argv, env=node.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(text)
                process.stdin.flush()
                for line in text.splitlines():
                    assert process.stdout.readline() == b"got " + line + b"\n"
                if code is None:
                    # Whoever goes does not end what was started without them.
                    process.kill()
                else:
                    assert process.wait(30) == code


class Talk:
    """A verb whose input and output are pipes of the test's."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process, self._input, self._output = process, process.stdin, process.stdout

    def say(self, text: bytes) -> None:
        self._input.write(text)
        self._input.flush()

    def line(self) -> bytes:
        return self._output.readline()

    def rest(self) -> tuple[bytes, int]:
        """What comes until the end, and the exit status."""
        return self._output.read(), self.process.wait(30)


@contextlib.contextmanager
def talking(node: nodes.Node, *arguments: str) -> Iterator[Talk]:
    argv = [sys.executable, "-m", "nixlet", *arguments]
    with subprocess.Popen(argv, env=node.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Talk(process)
        finally:
            process.kill()


def test_attach_reaches_a_container_in_the_foreground(node: nodes.Node, image: str) -> None:
    """Its output goes to both, and its input comes from either."""
    loop = "while read line; do echo got $line; [ $line = end ] && exit 5; done"
    with talking(node, "run", "--rm", "-i", "--name", "front", image, "--", "/bin/sh", "-c", loop) as front:
        front.say(b"one\n")
        assert front.line() == b"got one\n"
        with talking(node, "attach", "front") as beside:
            beside.say(b"two\n")
            assert (beside.line(), front.line()) == (b"got two\n", b"got two\n")
            front.say(b"end\n")
            assert (beside.rest(), front.rest()) == ((b"got end\n", 5), (b"got end\n", 5))


def test_two_keys_leave_a_container_alone_that_was_run(any_node: nodes.Node, image: str) -> None:
    with terminals.running(["run", "-it", "--name", "left", image, "--", "/bin/sh"], any_node.environment) as terminal:
        terminal.wait_for(b"# ")
        terminal.press(b"\x10\x11")
        assert terminal.end() == 0
    with terminals.running(["attach", "left"], any_node.environment) as terminal:
        terminal.press(b"echo a''gain\r")
        terminal.wait_for(b"again\r\n")
        terminal.press(b"exit 3\r")
        assert terminal.end() == 3
    any_node.ok("rm", "left")


def test_attach_to_a_container_of_another_client(any_node: nodes.Node, image: str, tmp_path: Path) -> None:
    """Made by crictl: its streams are containerd's."""
    sandbox = {"metadata": {"name": "other", "namespace": "default", "uid": "other", "attempt": 0}, "linux": {}}
    command = ["/bin/sh", "-c", "while read line; do echo got $line; [ $line = end ] && exit 5; done"]
    container = {
        "metadata": {"name": "other"},
        "image": {"image": image},
        "command": command,
        "stdin": True,
        "linux": {},
    }
    for name, config in (("sandbox", sandbox), ("container", container)):
        (tmp_path / name).write_text(json.dumps(config))
    any_node.crictl("pull", image)
    pod = any_node.crictl("runp", str(tmp_path / "sandbox"))
    try:
        made = any_node.crictl("create", "--no-pull", pod, str(tmp_path / "container"), str(tmp_path / "sandbox"))
        any_node.crictl("start", made)
        with talking(any_node, "attach", made) as front:
            for text in (b"one\n", b"end\n"):
                front.say(text)
                assert front.line() == b"got " + text
            assert front.rest() == (b"", 5)
    finally:
        any_node.crictl("rmp", "-f", pod)


def test_a_process_goes_on_when_its_client_is_killed(any_node: nodes.Node, image: str) -> None:
    with background(any_node, image) as container:
        script = (
            "echo up; i=0; while [ $i -lt 40000 ]; do echo some more output; i=$((i+1)); done; echo done > /tmp/done"
        )
        with talking(any_node, "exec", container, "/bin/sh", "-c", f"mkdir -p /tmp; {script}") as front:
            assert front.line() == b"up\n"
            front.process.kill()
            front.process.wait(30)
            nodes.until(
                lambda: any_node.run("exec", container, "/bin/sh", "-c", "[ -e /tmp/done ]").returncode == 0,
                "it goes on, though nobody reads what it prints",
            )


def test_the_first_and_unfinished_line_is_shown_at_once(any_node: nodes.Node, image: str) -> None:
    argv = [
        sys.executable,
        "-m",
        "nixlet",
        "run",
        "--rm",
        "-i",
        image,
        "--",
        "/bin/sh",
        "-c",
        "printf '? '; read a; echo $a",
    ]
    with subprocess.Popen(argv, env=any_node.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read(2) == b"? "
        process.stdin.write(b"answer\n")
        process.stdin.flush()
        assert process.stdout.read() == b"answer\n"
        assert process.wait(30) == 0


def test_the_log_has_what_was_shown(any_node: nodes.Node, image: str) -> None:
    try:
        any_node.ok("run", "--name", "shown", image, "--", "/bin/sh", "-c", "echo a; echo b; echo c; printf d")
        assert any_node.ok("logs", "shown") == "a\nb\nc\nd"
        assert any_node.ok("logs", "--tail", "2", "shown") == "c\nd"
        assert any_node.ok("logs", "--since", "10m", "-n", "1", "shown") == "d"
        assert any_node.ok("logs", "--since", "2999-01-01T00:00:00Z", "shown") == ""
    finally:
        any_node.ok("rm", "shown")


def test_a_terminal_has_a_size_and_its_settings_come_back(any_node: nodes.Node, image: str) -> None:
    with terminals.running(["run", "--rm", "-it", image, "--", "/bin/sh"], any_node.environment) as terminal:
        before = terminal.settings()
        terminal.wait_for(b"# ")
        assert terminal.settings() != before
        terminal.press(b"/bin/busybox stty size\r")
        terminal.wait_for(b"\r\n25 80\r\n")
        terminal.resize(101, 33)
        terminal.press(
            b"until /bin/busybox stty size | /bin/busybox grep '33 101'; do sleep 0.05; done; echo re''sized\r"
        )
        terminal.wait_for(b"\r\n33 101\r\nresized\r\n")
        # Ctrl-C is for the program inside.
        terminal.press(b"/bin/sh -c \"echo in''side; exec sleep 1000\"\r")
        terminal.wait_for(b"\r\ninside\r\n")
        terminal.press(b"\x03")
        terminal.wait_for(b"# ")
        terminal.press(b"false; exit 9\r")
        assert terminal.end() == 9
        assert terminal.settings() == before


def test_a_terminal_comes_back_after_an_error(any_node: nodes.Node, image: str) -> None:
    with (
        background(any_node, image) as container,
        terminals.running(["exec", "-it", container, "/bin/sh"], any_node.environment) as terminal,
    ):
        before = terminal.settings()
        terminal.wait_for(b"# ")
        any_node.ok("stop", "-t", "0", container)
        assert terminal.end() in {125, 137}
        assert terminal.settings() == before


def test_a_terminal_is_refused_where_there_is_none(any_node: nodes.Node, image: str) -> None:
    done = any_node.run("run", "--rm", "-it", image, stdin=b"")
    assert done.returncode == 2
    assert b"--tty needs a terminal, and standard input is none" in done.stderr
    assert json.loads(any_node.ok("ps", "-a", "--output", "json")) == []


@contextlib.contextmanager
def attached(node: nodes.Node, image: str, script: str) -> Iterator["subprocess.Popen[bytes]"]:
    argv = [sys.executable, "-m", "nixlet", "run", "--rm", image, "--", "/bin/sh", "-c", script]
    with subprocess.Popen(argv, env=node.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"up\n"
            yield process
            assert process.wait(30) is not None
        finally:
            process.kill()
    assert json.loads(node.ok("ps", "-a", "--output", "json")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_a_container_that_handles_them(any_node: nodes.Node, image: str, number: int) -> None:
    name = signal.Signals(number).name.removeprefix("SIG")
    script = f"trap 'echo caught; exit 3' {name}; echo up; while :; do sleep 0.1; done"
    with attached(any_node, image, script) as process:
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.readline() == b"caught\n"
        assert process.wait(30) == 3


def test_a_signal_ends_a_container_that_does_not_handle_it(any_node: nodes.Node, image: str) -> None:
    with attached(any_node, image, "echo up; exec sleep 1000") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


def test_a_container_that_refuses_to_end_is_ended_at_the_third_signal(any_node: nodes.Node, image: str) -> None:
    with attached(any_node, image, "trap '' INT; echo up; while :; do sleep 0.1; done") as process:
        for _ in range(3):
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert process.wait(30) == 128 + signal.SIGINT


def test_exec_hands_signals_on_and_leaves_nothing(any_node: nodes.Node, image: str) -> None:
    with background(any_node, image) as container:
        script = "trap 'echo caught; exit 3' TERM; echo up; while :; do sleep 0.1; done"
        argv = [sys.executable, "-m", "nixlet", "exec", container, "/bin/sh", "-c", script]
        with subprocess.Popen(argv, env=any_node.environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == b"caught\n"
            assert process.wait(30) == 3
        # Who reads our output and goes ends the process as well.
        endless = [sys.executable, "-m", "nixlet", "exec", container, "/bin/sh", "-c", "while :; do echo y; done"]
        with subprocess.Popen(endless, env=any_node.environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"y\n"
            process.stdout.close()
            assert process.wait(30) == 141
        assert any_node.ok("exec", container, "/bin/sh", "-c", "ls /proc | /bin/busybox grep -c '^[0-9]'").strip() in {
            "3",
            "4",
        }
        assert not list(any_node.state_dir.glob("exec-*"))


def test_exec_refuses_as_container_tools_do(any_node: nodes.Node, image: str) -> None:
    with background(any_node, image) as container:
        assert any_node.run("exec", container, "/bin/no-such-command").returncode == 127
        assert any_node.run("exec", container, "/bin").returncode == 126
        done = any_node.run("exec", "-u", "nobody", container, "/bin/true")
        assert (done.returncode, b"the container has no user nobody" in done.stderr) == (125, True)
        any_node.ok("stop", "-t", "0", container)
        done = any_node.run("exec", container, "/bin/true")
        assert (done.returncode, b"container background is not running" in done.stderr) == (125, True)
        assert any_node.run("attach", container).returncode == 125
    assert any_node.run("exec", "missing", "/bin/true").returncode == 125


def test_exec_changes_what_it_is_told_to(any_node: nodes.Node, image: str, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("A=file\nB=file\n")
    with background(any_node, image, options=("-e", "OWN=image")) as container:
        command = ["/bin/sh", "-c", "echo $OWN $A $B $(pwd); /bin/busybox grep -E '^(Uid|Gid)' /proc/self/status"]
        output = any_node.ok(
            "exec", "--env-file", str(file), "-e", "B=option", "-w", "/bin", "-u", "1000:7", container, *command
        )
    assert output.split() == ["image", "file", "option", "/bin", "Uid:", *["1000"] * 4, "Gid:", *["7"] * 4]


def test_exec_knows_the_users_of_the_container(any_node: nodes.Node, image: str, tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("root:x:0:0::/:\nada:x:1000:100::/:\n")
    (tmp_path / "group").write_text("users:x:100:\naudio:x:29:ada\n")
    volumes = ("-v", f"{tmp_path}/passwd:/etc/passwd:ro", "-v", f"{tmp_path}/group:/etc/group:ro")
    with background(any_node, image, options=volumes) as container:
        command = ["/bin/busybox", "id"]
        of_ada = "uid=1000(ada) gid=100(users) groups=29(audio),100(users)"
        assert any_node.ok("exec", "-u", "ada", container, *command).split() == of_ada.split()
        assert any_node.ok("exec", "-u", "1000", container, *command).split() == of_ada.split()
