"""Every error is a sentence and a hint, whoever it comes from."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nixlet import errors
from nixlet.cli import app, report
from nixlet.rpc import channel as channels
from nixlet.rpc import status


@pytest.mark.parametrize(
    ("arguments", "sentence", "hint"),
    [
        (
            ["run", "--privleged", "x"],
            "there is no option --privleged",
            "did you mean --privileged? usage: nixlet run ",
        ),
        (["run"], "missing argument 'IMAGE'", "usage: nixlet run "),
        (["ps", "--output", "xml"], "invalid value for '--output' / '-o': 'xml' is not one of", "usage: nixlet ps "),
        (["psx"], "no such command 'psx'", "usage: nixlet "),
        (["kube", "up"], "no such command 'up'", "usage: nixlet kube "),
        (["ps", "extra"], "got unexpected extra argument (extra)", "usage: nixlet ps "),
        (["rm"], "missing argument ", "usage: nixlet rm "),
        (["stop", "--state-dir"], "option '--state-dir' requires an argument", "nixlet VERB "),
    ],
)
def test_usage(arguments: list[str], sentence: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(arguments) == 2
    said, advice = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {sentence}")
    assert said[-1] not in ".?"
    assert advice.startswith(f"hint: {hint}")
    assert advice.endswith(" --help says more")


def test_what_containerd_answers_is_said_to_be_its_word() -> None:
    raw = GRPCError(Status.UNKNOWN, "failed to pull and unpack image: unexpected EOF")
    told = status.to_error(raw, "containerd at /run/x.sock")
    assert report.sentence(told) == f"containerd at /run/x.sock answered: {raw.message}"
    assert "logs" in report.hint(told)
    # Ours comes as it was said there, with its own hint.
    ours = status.to_error(status.from_error(errors.NotFoundError("it is not", hint="make it")), "containerd at /x")
    assert (report.sentence(ours), report.hint(ours)) == ("it is not", "make it")
    assert report.sentence(status.to_error(GRPCError(Status.NOT_FOUND, "x"), "the node at /x")) == "x"


def test_every_kind_of_error_has_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    kinds: list[Any] = [errors.NixletError, *errors.NixletError.__subclasses__()]
    for kind in kinds:
        report.print_error(kind("it is so", **({"returncode": 1} if kind is errors.CommandFailedError else {})))
        said, advice = capsys.readouterr().err.splitlines()
        assert said == "error: it is so"
        assert len(advice) > len("hint: ")


def test_a_working_directory_that_is_gone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    build = ["image", "build", "--config", "{}", "--closure", "/dev/null", "--ref", "a:1", "x.tar"]
    for arguments in (["image", "load", "x.tar"], build, ["ps", "--state-dir", "relative"]):
        assert app.run(arguments) == 125
        said, advice = capsys.readouterr().err.splitlines()
        assert (said, advice[:5]) == ("error: the working directory doesn't exist any more", "hint:")


async def test_who_has_no_rights_is_told_so(tmp_path: Path) -> None:
    """Not that nothing runs there."""
    tmp_path.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        (tmp_path / "s").chmod(0o600)
        os.setresuid(65534, 65534, 0)
        try:
            async with channels.connect(str(tmp_path / "s")) as channel:
                with (
                    pytest.raises(errors.PermissionDeniedError, match="it is not for you") as caught,
                    channels.translated("the node at /s"),
                ):
                    await channel.__connect__()
        finally:
            os.setresuid(0, 0, 0)
    assert caught.value.hint.startswith("run it as root")
