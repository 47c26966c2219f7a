"""What is read of a systemd unit that starts a node."""

import re
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.cli import unitfile

UNIT = """\
# A comment with ExecStart=/no
[Unit]
Description=a node
[Service]
Environment=A=1 "B=two words" 'C=3'
Environment=A=again
EnvironmentFile=-{directory}/%N.env
EnvironmentFile=-{directory}/nothing
ExecStart=/usr/local/bin/nixlet server --log "/a b" \\
  --pod-cidr=10.1.0.0/16 --private-registry /%%x/$$y
"""


def test_arguments_and_variables(tmp_path: Path) -> None:
    unit = tmp_path / "nixlet-one.service"
    unit.write_text(UNIT.format(directory=tmp_path))
    (tmp_path / "nixlet-one.env").write_text(
        '# B=0\n; B=0\nB=from the file\nD="a \\"q\\" \\$x"\nE=\'it \\ is\'\n\nF=\n no line\n'
    )
    start = unitfile.read(str(unit))
    assert start.arguments == [
        *("server", "--log", "/a b", "--pod-cidr=10.1.0.0/16", "--private-registry", "/%x/$y"),
    ]
    assert start.environment == {
        "A": "again",
        "B": "from the file",
        "C": "3",
        "D": 'a "q" $x',
        "E": "it \\ is",
        "F": "",
    }


def test_drop_ins_change_a_unit_in_their_order(tmp_path: Path) -> None:
    unit = tmp_path / "one.service"
    unit.write_text(
        "[Service]\nEnvironment = A=1 B=2\nEnvironmentFile=/no/such\n\tExecStart = /nixlet server --debug\n"
    )
    drop_ins = tmp_path / "one.service.d"
    drop_ins.mkdir()
    (drop_ins / "20-later.conf").write_text(f"[Service]\nEnvironment=B=3\nEnvironmentFile=-{tmp_path}/env\n")
    (drop_ins / "10-first.conf").write_text("[Service]\nEnvironment=\nEnvironmentFile=\nEnvironment=C=4 D=5\n")
    (drop_ins / "other").write_text("[Service]\nExecStart=\n")
    (tmp_path / "env").write_text("D=6\n")
    # The file that the first one takes back is not there, and need not be.
    unit.write_text(unit.read_text().replace("=/no/such", f"={tmp_path}/env"))
    assert unitfile.read(str(unit)) == unitfile.Start(["server", "--debug"], {"B": "3", "C": "4", "D": "6"})
    (drop_ins / "30.conf").write_text("[Service]\nExecStart=\nExecStart=/nixlet agent\n")
    assert unitfile.read(str(unit)).arguments == ["agent"]
    (drop_ins / "30.conf").write_text("[Service]\nExecStart=\n")
    with pytest.raises(errors.UsageError, match="starts nothing"):
        unitfile.read(str(unit))
    (drop_ins / "30.conf").write_text('[Service]\nExecStart=/nixlet "open\n')
    with pytest.raises(errors.UsageError, match=re.escape("one.service.d/30.conf: ExecStart=")):
        unitfile.read(str(unit))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[Service]\n", "starts nothing"),
        ('[Service]\nExecStart=/nixlet "open\n', "can't be read: No closing quotation"),
        ("[Service]\nEnvironmentFile=/nowhere/env\nExecStart=/nixlet server\n", "/nowhere/env can't be read"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, text: str, said: str) -> None:
    unit = tmp_path / "x.service"
    unit.write_text(text)
    with pytest.raises(errors.UsageError, match=re.escape(said)):
        unitfile.read(str(unit))
    with pytest.raises(errors.UsageError, match="No such file"):
        unitfile.read(str(tmp_path / "other"))
