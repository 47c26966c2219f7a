"""What a verb waits for before it runs: modules are counted, since every one costs time, and some much of it."""

import subprocess
import sys
from pathlib import Path

import pytest

#: What no verb that only asks the node may wait for; of packages, all that is in them.
SLOW = (
    "aiohttp",
    "array",
    "asyncio",
    "click",
    "collections",
    "concurrent",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "google",
    "grpclib",
    "importlib.metadata",
    "inspect",
    "json",
    "logging",
    "msgspec",
    "multiprocessing",
    "re",
    "rich",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "typing",
    "yaml",
)

#: A command line for each verb that only asks the node, and for each way of saying something.
COMMAND_LINES = (
    ["ps"],
    ["ps", "-aq", "--output=json", "--state-dir", "/x"],
    ["exec", "-it", "-e", "A=1", "--workdir", "/", "name", "sh", "-c", "true"],
    ["run", "--rm", "-itd", "-v/a:/b", "-p", "80:80", "--network", "none", "image", "--", "command", "--rm"],
    ["logs", "-f", "--tail=3", "name"],
    ["stop", "-t", "5", "name", "other"],
    ["rm", "-f", "name"],
    ["images"],
    ["image", "load", "archive"],
    ["inspect", "name"],
    ["attach", "name"],
    ["kube", "play", "--wait", "-"],
    ["kube", "down", "-"],
    ["ctr", "--state-dir", "/x", "images", "ls", "--help"],
    ["crictl", "ps"],
    ["kubectl", "get", "pods", "-o", "wide"],
    ["certificate", "check", "-s", "api-server"],
    ["token", "create", "--ttl", "1h"],
    ["version"],
)


def loaded(program: str) -> set[str]:
    """The modules that a program loads in an interpreter of its own, besides those that each interpreter loads."""
    script = f"import sys; before = set(sys.modules); {program}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def slow(found: set[str]) -> set[str]:
    """Of which of the slow ones there is something among modules."""
    return {name for name in SLOW if any(each == name or each.startswith(f"{name}.") for each in found)}


@pytest.mark.parametrize("arguments", COMMAND_LINES, ids=" ".join)
def test_a_command_line_is_read_without_what_takes_long(arguments: list[str]) -> None:
    found = loaded(f"from nixlet import __main__; from nixlet.cli import app, streams; app.parse({arguments!r})")
    assert slow(found) == set()
    assert len(found) <= 25, sorted(found)


#: Verbs that only ask, as whole commands; the error that there is no node is as long a way as most questions.
ASKING = (
    ["ps"],
    ["exec", "name", "command"],
    ["attach", "name"],
    ["logs", "name"],
    ["inspect", "name"],
    ["stats"],
    ["stop", "name"],
    ["rm", "name"],
    ["images"],
    ["image", "load", "/dev/null"],
    ["version"],
    ["run", "--rm", "-e", "A=1", "image", "true"],
    ["kube", "down", "/dev/null"],
)


@pytest.mark.parametrize("arguments", ASKING, ids=" ".join)
def test_a_node_is_asked_without_what_takes_long(arguments: list[str], tmp_path: Path) -> None:
    found = loaded(
        "import io; from nixlet import __main__; from nixlet.cli import app, streams; out, sys.stdout = sys.stdout, io.StringIO(); "
        f"app.run([*{arguments!r}, '--state-dir', {str(tmp_path)!r}]); sys.stdout = out"
    )
    if arguments[0] == "logs":
        # A log's records have types.
        assert slow(found) <= {"collections", "contextlib", "enum", "functools", "re", "typing"}
        assert len(found) <= 65, sorted(found)
    else:
        assert slow(found) == set()
        assert len(found) <= 35, sorted(found)


def test_the_parser_of_replies_is_read_while_the_node_is_at_work(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    question = f"""
import _socket
listening = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
listening.bind({path!r})
listening.listen()
from nixlet.cli import link
node = link.Node({path!r})
before_it = "json" in sys.modules
node.send("GetVersion")
print(before_it, "json" in sys.modules, end=" ")
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys\n{question}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]


def test_slow_modules_would_be_seen() -> None:
    assert {"click", "re", "inspect"} <= loaded("from nixlet.cli import clickadapter")


def test_an_error_is_told_without_them() -> None:
    found = loaded(
        "from nixlet import errors; from nixlet.cli import report; "
        "report.print_error(errors.UnavailableError('x', hint='y'))"
    )
    assert len(found) <= 6, sorted(found)
