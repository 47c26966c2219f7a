"""The parts of install.sh, each by itself: words, variables, what is missing, and how a change is made and taken back."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from nixlet.cli import unitfile

ROOT = Path(__file__).parents[2]
SHELLS = [name for name in ("dash", "bash", "busybox") if shutil.which(name)]


def shell(script: str, *, program: str = "dash", **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a script that has all functions of the installer."""
    libraries = "".join(
        f". {ROOT}/scripts/lib/{name}.sh; " for name in ("packages", "environment", "service", "installing")
    )
    argv = [*([program, "sh"] if program == "busybox" else [program]), "-euc", libraries + script]
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)


def ok(script: str, **variables: str) -> str:
    done = shell(script, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


WORDS = ["server", "--log=/var/log/a b", "", 'say "x"', "back\\slash", "$HOME", "100%", "%n", "it's", "a;b", "ö", "#no"]


@pytest.mark.parametrize("program", SHELLS)
def test_a_unit_has_the_words_that_were_given(tmp_path: Path, program: str) -> None:
    words = " ".join(map(shlex.quote, WORDS))
    template = ROOT / "deploy/nixlet.service"
    script = f'words=$(quoted_words {words}); unit_text {template} "/usr/local/bin/nixlet$words" /etc/its.env'
    done = shell(script, program=program)
    assert done.returncode == 0, done.stderr
    unit = tmp_path / "nixlet.service"
    unit.write_text(done.stdout)
    assert unitfile.read(str(unit)).arguments == WORDS
    # And they are kept as they stand.
    kept = ok(f'unit_text {template} "/usr/local/bin/nixlet$(started_by {unit})" /etc/its.env')
    assert kept == done.stdout
    assert [line for line in kept.splitlines() if line not in template.read_text().splitlines()] == [
        "EnvironmentFile=-/etc/its.env",
        next(line for line in kept.splitlines() if line.startswith("ExecStart=")),
    ]
    verified = ["systemd-analyze", "verify", "--man=no", str(unit)]
    unit.write_text(kept.replace("/usr/local/bin/nixlet ", "/bin/true "))
    assert subprocess.run(verified, capture_output=True, text=True, check=False).stderr == ""


def test_a_word_with_a_line_break_is_refused() -> None:
    done = shell("quoted_words server 'a\nb'")
    assert done.returncode == 125
    assert done.stderr.startswith("error: an argument has a line break")


VALUES = {"NIXLET_TOKEN": "K10\"$x`y\\z'", "CONTAINERD_X": " blank ", "https_proxy": "http://p:1", "NO_PROXY": "a,b"}


@pytest.mark.parametrize("program", SHELLS)
def test_variables_are_what_they_were(tmp_path: Path, program: str) -> None:
    own = tmp_path / "x.service.env"
    done = shell("variables_text '' /nix/bin:/bin", program=program, OTHER="1", INSTALL_NIXLET_NAME="1", **VALUES)
    assert done.returncode == 0, done.stderr
    own.write_text(done.stdout)
    unit = tmp_path / "x.service"
    unit.write_text(f"[Service]\nEnvironmentFile=-{own}\nExecStart=/nixlet server\n")
    assert unitfile.read(str(unit)).environment == {**VALUES, "PATH": "/nix/bin:/bin"}
    # Without a word of them they stay, in their places; one that is set to nothing goes; the rest is the owner's.
    own.write_text(f"# mine\n{done.stdout}FOO=bar baz\n")
    assert ok(f"variables_text {own} /other") == own.read_text()
    assert ok(f"variables_text {own}", **VALUES) == own.read_text()
    changed = ok(f"variables_text {own}", NIXLET_TOKEN="", NO_PROXY="c", NIXLET_URL="https://a:6443")
    assert "NIXLET_TOKEN" not in changed
    assert re.findall("^(?:NO_PROXY|NIXLET_URL)=.*$", changed, re.MULTILINE) == [
        'NO_PROXY="c"',
        'NIXLET_URL="https://a:6443"',
    ]
    done = shell(f"variables_text {own}", program=program, NIXLET_TOKEN="a\nb")
    assert done.returncode == 125
    assert "NIXLET_TOKEN has a line break" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "there", "name", "words"),
    [
        ("", {}, "", "nixlet", "server"),
        ("--debug", {}, "", "nixlet", "server --debug"),
        ("agent --debug", {}, "", "nixlet-agent", "agent --debug"),
        ("", {"NIXLET_URL": "https://a", "NIXLET_TOKEN": "t"}, "", "nixlet-agent", "agent"),
        ("server", {"NIXLET_URL": "https://a"}, "", "nixlet", "server"),
        ("--debug", {"INSTALL_NIXLET_EXEC": "agent --log '/a b'"}, "", "nixlet-agent", 'agent --log "/a b" --debug'),
        ("", {"INSTALL_NIXLET_EXEC": "--debug"}, "", "nixlet", "server --debug"),
        ("agent --debug", {"INSTALL_NIXLET_EXEC": "--log x"}, "", "nixlet-agent", "agent --log x --debug"),
        ("agent", {"INSTALL_NIXLET_EXEC": "agent -d /x"}, "nixlet", "nixlet-agent", "agent -d /x"),
        ("", {"INSTALL_NIXLET_EXEC": "server"}, "nixlet", "nixlet", "server"),
        ("", {"INSTALL_NIXLET_NAME": "two"}, "", "nixlet-two", "server"),
        ("agent", {"INSTALL_NIXLET_NAME": "two"}, "", "nixlet-two", "agent"),
        # What is there stays where nothing is said.
        ("", {}, "nixlet", "nixlet", 'server --log "/a b"'),
        ("", {}, "nixlet-agent", "nixlet-agent", 'server --log "/a b"'),
        ("server", {}, "nixlet", "nixlet", "server"),
        ("", {}, "nixlet-two", "nixlet", "server"),
    ],
)
def test_what_is_started(
    tmp_path: Path, arguments: str, variables: Mapping[str, str], there: str, name: str, words: str
) -> None:
    if there:
        (tmp_path / f"{there}.service").write_text('[Service]\nExecStart=/usr/local/bin/nixlet server --log "/a b"\n')
    script = f'settle_places; settle_command {arguments}; echo "$name:$words"'
    assert ok(script, INSTALL_NIXLET_SYSTEMD_DIR=str(tmp_path), **variables) == f"{name}: {words}\n"


@pytest.mark.parametrize(
    ("script", "variables", "said"),
    [
        ("settle_places; settle_command server x", {}, "a node is a server or an agent, not 'x'"),
        (
            "settle_places; settle_command server",
            {"INSTALL_NIXLET_EXEC": "agent"},
            "INSTALL_NIXLET_EXEC asks for agent, and the command line for server",
        ),
        ("settle_places; settle_command start", {}, "a node is a server or an agent, not 'start'"),
        (
            "settle_places; settle_command",
            {"NIXLET_URL": "https://a"},
            "neither NIXLET_TOKEN nor NIXLET_TOKEN_FILE says",
        ),
        ("settle_places; settle_command", {"INSTALL_NIXLET_NAME": "a/b"}, "'nixlet-a/b' is no name for a service"),
        (
            "settle_places; settle_command",
            {"INSTALL_NIXLET_EXEC": "server 'open"},
            "INSTALL_NIXLET_EXEC can't be parted into",
        ),
        ("settle_places", {"INSTALL_NIXLET_BIN_DIR": "/a b"}, "has a blank or a sign in its name"),
        ("settle_places", {"INSTALL_NIXLET_BIN_DIR": "bin"}, "must be named from / on"),
    ],
)
def test_what_cannot_be_started_is_refused(script: str, variables: Mapping[str, str], said: str) -> None:
    done = shell(script, **variables)
    assert done.returncode == 125
    assert said in done.stderr


ELSEWHERE = "Nix from https://nixos.org/download\n"
PACKAGES = "containerd runc nix-bin containernetworking-plugins iptables catatonit python3 python3-venv"


@pytest.mark.parametrize(
    ("manager", "how"),
    [
        ("apt-get", f"apt-get install {PACKAGES}\n"),
        ("dnf", f"dnf install containerd runc containernetworking-plugins iptables-nft catatonit python3\n{ELSEWHERE}"),
        ("zypper", f"zypper install containerd runc cni-plugins iptables catatonit python313\n{ELSEWHERE}"),
        ("pacman", "pacman -S containerd runc nix cni-plugins iptables catatonit python\n"),
        ("apk", "apk add containerd runc nix cni-plugins iptables catatonit python3\n"),
        ("''", ""),
    ],
)
def test_each_systems_packages_have_names(manager: str, how: str) -> None:
    assert ok('echo "$node_packages"') == f"{PACKAGES}\n"
    assert ok(f"how_to_install {manager} $node_packages") == how


@pytest.mark.parametrize("manager", ["dnf", "apk"])
def test_what_is_missing_is_said_with_the_packages_names(tmp_path: Path, manager: str) -> None:
    """On a machine that has nothing but another system's package manager."""
    for name in ("sed", "cat"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    (tmp_path / manager).write_text("#!/bin/sh\n")
    (tmp_path / manager).chmod(0o755)
    script = f"PATH={tmp_path}; missing_packages; missing='runc python3 python3-venv'; check_packages() {{ name_missing; }}; check_packages"
    done = shell(script)
    assert done.returncode == 125
    assert done.stderr.splitlines() == [
        "error: this machine lacks what a node needs:",
        "    runc                          starts each container",
        "    python3                       Python 3.11 or later",
        "    python3-venv                  Python's modules venv and ensurepip",
        f"hint: {'dnf install' if manager == 'dnf' else 'apk add'} runc python3",
    ]


#: The installer's state, with two versions that are only directories, and a systemd that isn't there.
PLACES = """
top=$TOP opt=$T/opt bin=$T/bin units=$T/units config=$T/config share=$T/share before=$T/opt/.before
name=nixlet unit=$units/nixlet.service variables=$units/nixlet.service.env version=2 home=$opt/2
new_unit=$units/.nixlet.service.new new_variables=$units/.nixlet.service.env.new changing= restart_needed= building=
systemd_runs=/nowhere
on_disk() { :; }
write_beside() { :; }
"""

#: What changes files dies before its COUNT-th call: a power cut.
CUT = """
count=0
strike() { count=$((count + 1)); [ "$count" != "$COUNT" ] || kill -9 $$; }
for tool in mv cp rm ln mkdir; do eval "$tool() { strike; command $tool \\"\\$@\\"; }"; done
"""


def prepare(directory: Path, *, first: bool) -> None:
    for number in ("1", "2"):
        program = directory / "opt" / number / "bin/nixlet"
        program.parent.mkdir(parents=True)
        program.touch(mode=0o755)
        (directory / "opt" / number / "pyvenv.cfg").touch()
    for name in ("bin", "units", "config", "share"):
        (directory / name).mkdir()
    if not first:
        (directory / "bin/nixlet").symlink_to(f"{directory}/opt/1/bin/nixlet")
        (directory / "units/nixlet.service").write_text("one\n")
        (directory / "units/nixlet.service.env").write_text("A=1\n")
    (directory / "units/.nixlet.service.new").write_text("two\n")
    (directory / "units/.nixlet.service.env.new").write_text("A=2\n")


def in_force(directory: Path) -> tuple[str, str, str]:
    link, units = directory / "bin/nixlet", directory / "units"
    read = [
        path.read_text() if path.exists() else "" for path in (units / "nixlet.service", units / "nixlet.service.env")
    ]
    return os.readlink(link).removeprefix(f"{directory}/opt/") if link.is_symlink() else "", read[0], read[1]


@pytest.mark.parametrize("first", [False, True])
def test_a_change_that_is_cut_off_anywhere_is_taken_back_by_the_next_run(tmp_path: Path, first: bool) -> None:
    old = ("", "", "") if first else ("1/bin/nixlet", "one\n", "A=1\n")
    new = ("2/bin/nixlet", "two\n", "A=2\n")
    seen = set()
    for count in range(1, 100):
        directory = tmp_path / str(count)
        directory.mkdir()
        prepare(directory, first=first)
        variables = {"T": str(directory), "TOP": str(ROOT), "COUNT": str(count)}
        done = shell(f"{PLACES}{CUT}put_in_force; in_force", **variables)
        halfway = in_force(directory)
        # Each of the three is one or the other, whole.
        assert all(value in pair for value, pair in zip(halfway, zip(old, new, strict=True), strict=True))
        # The one that is being cut off while it takes back is no better off.
        shell(f"{PLACES}{CUT}take_back_what_was_cut_off", **{**variables, "COUNT": "3"})
        ok(f"{PLACES}take_back_what_was_cut_off", **variables)
        after = in_force(directory)
        assert after in (old, new)
        seen.add((done.returncode, after))
        assert not list((directory / "opt").glob(".before*"))
        if done.returncode == 0:
            assert after == new
            break
    else:
        raise AssertionError("it never came to its end")
    assert seen == {(-9, old), (-9, new), (0, new)}


def test_what_is_not_needed_goes_and_the_last_one_stays(tmp_path: Path) -> None:
    prepare(tmp_path, first=False)
    (tmp_path / "opt/3/bin").mkdir(parents=True)
    (tmp_path / "opt/3/pyvenv.cfg").touch()
    (tmp_path / "opt/mine").mkdir()
    variables = {"T": str(tmp_path), "TOP": str(ROOT)}
    ok(f"{PLACES}tidy", **variables)
    assert {path.name for path in (tmp_path / "opt").iterdir() if path.is_dir()} == {"1", "mine"}
    for number in ("2", "3"):
        prepare_again = tmp_path / "opt" / number / "bin"
        prepare_again.mkdir(parents=True)
        (prepare_again.parent / "pyvenv.cfg").touch()
    # Something still runs from 3.
    with subprocess.Popen(["sh", "-c", f"sleep 100 # {tmp_path}/opt/3/bin/python"], start_new_session=True) as process:
        try:
            ok(f'{PLACES}point_at "$opt/2/bin/nixlet"; tidy; tidy', **variables)
        finally:
            os.killpg(process.pid, 9)
    assert {path.name for path in (tmp_path / "opt").iterdir() if path.is_dir()} == {"1", "2", "3", "mine"}
    ok(f"{PLACES}tidy", **variables)
    assert {path.name for path in (tmp_path / "opt").iterdir() if path.is_dir()} == {"1", "2", "mine"}


def piped(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": os.environ["PATH"], **variables}
    script = (ROOT / "install.sh").read_text()
    argv = ["dash", "-s", "-", *arguments]
    return subprocess.run(argv, input=script, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "nothing says where nixlet is to come from"),
        (
            "http://127.0.0.1:9/nixlet.tar.gz",
            "anybody on the way can exchange what comes from http://127.0.0.1:9/nixlet.tar.gz",
        ),
        ("git+http://127.0.0.1:9/nixlet", "anybody on the way can exchange"),
        ("https://127.0.0.1:9/nixlet.tar.gz", "https://127.0.0.1:9/nixlet.tar.gz could not be fetched"),
        ("/nowhere/nixlet.tar.gz", "INSTALL_NIXLET_SOURCE names /nowhere/nixlet.tar.gz, which is not there"),
        ("/", "the directory / holds no nixlet"),
    ],
)
def test_where_nixlet_cannot_come_from(source: str, said: str) -> None:
    done = piped("server", **({"INSTALL_NIXLET_SOURCE": source} if source else {}))
    assert done.returncode == 125
    assert f"error: {said}" in done.stderr


@pytest.mark.parametrize("nested", [True, False])
def test_an_archives_own_installer_installs_it(tmp_path: Path, nested: bool) -> None:
    source = tmp_path / "nixlet-1"
    for name in ("install.sh", "scripts/lib/installing.sh", "src/nixlet/__init__.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    (source / "install.sh").write_text('echo "$PWD" "$0" "$@" "[$INSTALL_NIXLET_SOURCE]"; cat; exit 3\n')
    archive = tmp_path / "nixlet.tar.gz"
    subprocess.run(["tar", "-C", *([str(tmp_path), "-czf", str(archive), "nixlet-1"] if nested else [str(source), "-czf", str(archive), "."])], check=True)  # fmt: skip
    done = piped("agent", "a b", INSTALL_NIXLET_SOURCE=str(archive), TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode != 0
    (tmp_path / "tmp").mkdir()
    done = piped("agent", "a b", INSTALL_NIXLET_SOURCE=str(archive), TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 3, done.stderr
    assert (
        re.fullmatch(rf"{ROOT}\S* {tmp_path}/tmp/\S+/install.sh agent a b \[\]\n", done.stdout)
        or "agent a b []" in done.stdout
    )
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_repository_is_cloned_at_what_was_asked_for(tmp_path: Path) -> None:
    source = tmp_path / "nixlet.git"
    for name in ("scripts/lib/installing.sh", "src/nixlet/__init__.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@example"]
    subprocess.run(["git", "init", "--quiet", str(source)], check=True)
    for tag in ("v1", "v2"):
        (source / "install.sh").write_text(f'echo {tag} "[$INSTALL_NIXLET_VERSION]"\n')
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", tag], check=True)
        subprocess.run([*git, "tag", tag], check=True)
    for tag in ("v1", "v2"):
        done = piped(INSTALL_NIXLET_SOURCE=f"git+file://{source}", INSTALL_NIXLET_VERSION=tag, HOME=str(tmp_path))
        assert (done.returncode, done.stdout) == (0, f"{tag} []\n"), done.stderr
