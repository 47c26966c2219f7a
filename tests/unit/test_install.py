"""The parts of install.sh, each by itself: words, variables, what is missing, and how a change is made and taken back."""

import fcntl
import http.server
import os
import re
import shlex
import shutil
import ssl
import stat
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from nixlet.cli import unitfile
from support import registries

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
    continued = kept.replace('" "', '" \\\n  "').replace("nixlet server", "nixlet \\\nserver")
    assert continued.count("\\\n") > 3
    unit.write_text(continued)
    assert unitfile.read(str(unit)).arguments == WORDS
    unit.write_text(ok(f'unit_text {template} "/usr/local/bin/nixlet$(started_by {unit})" /etc/its.env'))
    assert unitfile.read(str(unit)).arguments == WORDS
    assert [line for line in kept.splitlines() if line not in template.read_text().splitlines()] == [
        "EnvironmentFile=-/etc/its.env",
        next(line for line in kept.splitlines() if line.startswith("ExecStart=")),
    ]
    verified = ["systemd-analyze", "verify", "--man=no", str(unit)]
    unit.write_text(kept.replace("/usr/local/bin/nixlet ", "/bin/true "))
    assert subprocess.run(verified, capture_output=True, text=True, check=False).stderr == ""


@pytest.mark.parametrize(
    "starts",
    [
        "ExecStart=/usr/bin/env A=1 nixlet server",
        "ExecStart=/usr/bin/mynixlet",
        "",
        "ExecStart=/bin/nixlet a\nExecStart=/bin/nixlet b",
    ],
)
def test_what_somebody_elses_unit_starts_is_not_guessed(tmp_path: Path, starts: str) -> None:
    (tmp_path / "nixlet.service").write_text(f"[Service]\n{starts}\n")
    done = shell("settle_places; settle_command", INSTALL_NIXLET_SYSTEMD_DIR=str(tmp_path))
    assert done.returncode == 125
    assert "was written by somebody else" in done.stderr
    said = ok('settle_places; settle_command server; echo "$words"', INSTALL_NIXLET_SYSTEMD_DIR=str(tmp_path))
    assert said == " server\n"


def test_a_unit_that_is_a_link_or_masked_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "nixlet.service").symlink_to("/dev/null")
    done = shell("settle_places; settle_command", INSTALL_NIXLET_SYSTEMD_DIR=str(tmp_path))
    assert done.returncode == 125
    assert f"{tmp_path}/nixlet.service is a link, to /dev/null" in done.stderr


def test_a_service_is_told_of_another_place_for_its_configuration(tmp_path: Path) -> None:
    template, unit = ROOT / "deploy/nixlet.service", tmp_path / "x.service"
    unit.write_text(ok(f'unit_text {template} "/bin/nixlet server" /x /srv/etc/config.yaml'))
    assert unitfile.read(str(unit)).environment == {"NIXLET_CONFIG_FILE": "/srv/etc/config.yaml"}
    lines = unit.read_text().splitlines()
    # What a file of variables says wins.
    assert lines.index("Environment=NIXLET_CONFIG_FILE=/srv/etc/config.yaml") < lines.index("EnvironmentFile=-/x")


@pytest.mark.parametrize("program", SHELLS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("agent --server https://a --token 'K10 x'", " agent --server https://a"),
        ("agent '--token=K10 x' --server https://a", " agent --server https://a"),
        ("agent '-tK10 x'", " agent"),
        ("server -t 'K10 x' --token-file /a", " server --token-file /a"),
        ("--debug", " server --debug"),
    ],
)
def test_a_secret_is_a_variable_and_not_in_the_unit(tmp_path: Path, program: str, arguments: str, words: str) -> None:
    """Everybody may read a unit, and ask systemd for its command."""
    extra = "" if "K10" in arguments else "-t 'K10 x'"
    script = f'settle_places; settle_command {arguments}; echo "$words"; echo "$argument_list"; variables_text \'\''
    done = shell(script, program=program, INSTALL_NIXLET_SYSTEMD_DIR=str(tmp_path), INSTALL_NIXLET_EXEC=extra)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == words
    assert [line for line in said if "K10" in line] == ['NIXLET_TOKEN="K10 x"']
    others = "settle_places; settle_command --agent-token a --datastore-endpoint=b; echo \"$words\"; variables_text ''"
    assert ok(others, INSTALL_NIXLET_SYSTEMD_DIR=str(tmp_path)) == (
        ' server\nNIXLET_AGENT_TOKEN="a"\nNIXLET_DATASTORE_ENDPOINT="b"\n'
    )


@pytest.mark.parametrize("program", SHELLS)
def test_a_secret_of_a_unit_that_was_there_becomes_a_variable(tmp_path: Path, program: str) -> None:
    """Of one that was written by hand: the rest stays as it stands, also what only systemd expands."""
    unit = tmp_path / "nixlet.service"
    script = "settle_places; settle_command; echo \"$words\"; variables_text ''"
    places = {"INSTALL_NIXLET_SYSTEMD_DIR": str(tmp_path)}
    for given in ('--token "K10 \\"$$x"', '"--token=K10 \\"$$x"', '-t "K10 \\"$$x"', '"-tK10 \\"$$x"'):
        unit.write_text(f'[Service]\nExecStart=/bin/nixlet server --node-name %H {given} --log "/a b" ""\n')
        done = shell(script, program=program, **places)
        assert done.stdout == ' server --node-name %H --log "/a b" ""\nNIXLET_TOKEN="K10 \\"\\$x"\n', done.stderr
        # What is said now goes before what was said then.
        assert 'NIXLET_TOKEN="new"' in shell(script, program=program, NIXLET_TOKEN="new", **places).stdout
    unit.write_text("[Service]\nExecStart=/bin/nixlet server  --agent-token=a --datastore-endpoint b --debug\n")
    done = shell(script, program=program, **places)
    assert done.stdout == ' server --debug\nNIXLET_AGENT_TOKEN="a"\nNIXLET_DATASTORE_ENDPOINT="b"\n', done.stderr
    unit.write_text("[Service]\nExecStart=/bin/nixlet server  --token-file /a -d /b\n")
    assert shell(script, program=program, **places).stdout == " server  --token-file /a -d /b\n"


def test_an_agents_flags_stay_where_its_variables_are_said_once_more(tmp_path: Path) -> None:
    unit = tmp_path / "nixlet-agent.service"
    unit.write_text("[Service]\nExecStart=/usr/local/bin/nixlet agent --kubernetes-bin-dir /opt/k\n")
    variables = {"INSTALL_NIXLET_SYSTEMD_DIR": str(tmp_path), "NIXLET_URL": "https://a", "NIXLET_TOKEN": "t"}
    script = 'settle_places; settle_command; echo "$name:$words"'
    assert ok(script, **variables) == "nixlet-agent: agent --kubernetes-bin-dir /opt/k\n"
    # A server that is to become one has other flags.
    unit.write_text("[Service]\nExecStart=/usr/local/bin/nixlet server --debug\n")
    assert ok(script, **variables) == "nixlet-agent: agent\n"
    unit.write_text("[Service]\nExecStart=/usr/bin/env nixlet\n")
    assert ok(script, **variables) == "nixlet-agent: agent\n"


def test_a_configuration_at_a_place_of_its_own_stays_the_services(tmp_path: Path) -> None:
    (tmp_path / "nixlet.service").write_text(
        "[Service]\nEnvironment=NIXLET_CONFIG_FILE=/srv/etc/config.yaml\nExecStart=/bin/nixlet server\n"
    )
    script = 'settle_places; settle_command; echo "$config"'
    places = {"INSTALL_NIXLET_SYSTEMD_DIR": str(tmp_path)}
    assert ok(script, **places) == "/srv/etc\n"
    assert ok(script, INSTALL_NIXLET_CONFIG_DIR="/other", **places) == "/other\n"
    assert ok(script, INSTALL_NIXLET_NAME="two", **places) == "/etc/nixlet\n"


@pytest.mark.parametrize("there", [True, False])
def test_settings_are_looked_at_with_the_services_own_configuration(tmp_path: Path, there: bool) -> None:
    program = tmp_path / "home/bin/nixlet"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\necho "$NIXLET_CONFIG_FILE" "$@" >{tmp_path}/said\n')
    program.chmod(0o755)
    if there:
        (tmp_path / "config.yaml").touch()
    script = f"home={tmp_path}/home config={tmp_path} kept= argument_list=server; check_settings; config=/etc/nixlet"
    ok(script)
    file = tmp_path / "config.yaml" if there else Path("/dev/null")
    assert (tmp_path / "said").read_text() == f"{file} server --show-config\n"
    ok(script, NIXLET_CONFIG_FILE="/mine")
    assert (tmp_path / "said").read_text() == "/mine server --show-config\n"
    ok(f"{script}; check_settings")
    assert (tmp_path / "said").read_text() == " server --show-config\n"


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
        ("settle_places", {"INSTALL_NIXLET_READY_SECONDS": "5m"}, "is '5m', and no number of seconds"),
        ("settle_places; settle_command agent --token", {}, "--token needs a value"),
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


@pytest.mark.parametrize("known", ["python3.11-venv", "python3.9-venv"])
def test_a_release_whose_python_is_too_old_has_a_later_one_beside_it_or_nothing_is_changed(
    tmp_path: Path, known: str
) -> None:
    """As Ubuntu 22.04."""
    for name, does in (("python3", "echo 3.10"), ("apt-get", ":"), ("apt-cache", f"[ $2 = {known} ]")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    script = f"PATH={tmp_path}:$PATH; missing_packages() {{ missing='runc python3 python3-venv'; }}; check_packages; echo $missing"
    done = shell(script)
    if known == "python3.11-venv":
        assert (done.returncode, done.stdout) == (0, "runc python3.11 python3.11-venv\n"), done.stderr
        done = shell(script, INSTALL_NIXLET_SKIP_PACKAGES="true")
        assert "    python3.11                    Python 3.11 or later\n" in done.stderr
        assert "hint: apt-get install runc python3.11 python3.11-venv\n" in done.stderr
    else:
        assert "there is a python3, of version 3.10" in done.stderr
        assert "hint: apt knows no other Python" in done.stderr
        assert done.stderr.endswith("hint: apt-get install runc\n")
    assert done.returncode == 125


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
top=$TOP opt=$T/opt bin=$T/bin units=$T/units config=$T/config share=$T/share before=$T/opt/.before ready=$T/opt/.ready
name=nixlet unit=$units/nixlet.service variables=$units/nixlet.service.env version=2 home=$opt/2
new_unit=$units/.nixlet.service.new new_variables=$units/.nixlet.service.env.new changing= restart_needed= building= unfinished=$T/opt/.unfinished
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
        (directory / "opt" / number / ".nixlet-stamp").touch()
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
        # The unit that was there before is somebody's work: the installer's own names the file of variables.
        assert first or done.returncode != 0 or (directory / "units/nixlet.service.orig").read_text() == "one\n"
        if done.returncode == 0:
            assert after == new
            break
    else:
        raise AssertionError("it never came to its end")
    assert seen == {(-9, old), (-9, new), (0, new)}


#: A systemd that says STATE and RUN, and where the first start that is waited for fails.
SYSTEMD = """
has_systemd() { :; }
systemctl() { :; }
last_words() { :; }
property() { case $2 in ActiveState) echo "$STATE" ;; InvocationID) echo "$RUN" ;; esac; }
await_ready() { if [ -n "${failed-}" ]; then return 0; fi; failed=yes; return 1; }
"""


@pytest.mark.parametrize(("state", "run", "back"), [("active", "a", 1), ("inactive", "", 1), ("active", "b", 2)])
def test_one_goes_back_to_what_was_seen_ready_with_its_own_unit_and_variables(
    tmp_path: Path, state: str, run: str, back: int
) -> None:
    prepare(tmp_path, first=False)
    kept = [("1/bin/nixlet", "one\n", "A=1\n"), ("2/bin/nixlet", "two\n", "A=2\n")]
    variables = {"T": str(tmp_path), "TOP": str(ROOT), "STATE": "active", "RUN": "a"}
    # Put there, and not to be started; twice, as an image of a machine is brought up to date.
    units = tmp_path / "units"
    for version in ("2", "2"):
        (units / ".nixlet.service.new").write_text("two\n")
        (units / ".nixlet.service.env.new").write_text("A=2\n")
        script = f"{PLACES}{SYSTEMD}home=$opt/{version}; put_in_force; start_service; tidy"
        ok(script, INSTALL_NIXLET_SKIP_START="true", **variables)
        assert in_force(tmp_path) == kept[1]
        assert (tmp_path / "opt/1/bin/nixlet").exists()
    assert stat.S_IMODE((tmp_path / "opt/.ready").stat().st_mode) == 0o700
    (tmp_path / "opt/3/bin").mkdir(parents=True)
    (tmp_path / "opt/3/.nixlet-stamp").touch()
    (units / ".nixlet.service.new").write_text("three\n")
    (units / ".nixlet.service.env.new").write_text("A=3\n")
    # Meanwhile it was started by somebody and is well; or was not.
    now = {**variables, "STATE": state, "RUN": run}
    done = shell(f"{PLACES}{SYSTEMD}version=3 home=$opt/3; put_in_force; start_service", **now)
    assert done.returncode == 125
    assert f"nixlet 3 did not get ready as nixlet: its last words are above; what was there before is in force again, and ready ({tmp_path}/opt/{back}/bin/nixlet)" in done.stderr  # fmt: skip
    assert in_force(tmp_path) == kept[back - 1]
    assert sorted(path.name for path in (tmp_path / "opt").glob(".*")) == []


def test_what_a_start_takes_too_long_for_is_told() -> None:
    script = (
        "name=nixlet; systemctl() { :; }; await_ready() { return 1; };"
        ' property() { case $2 in ActiveState) echo activating ;; SubState) echo "$SUB" ;; esac; };'
        ' restart_until_ready || echo "not$unready_for"'
    )
    assert ok(script, SUB="start", INSTALL_NIXLET_READY_SECONDS="7").startswith("not in 7 s (more is had by INSTALL_")
    assert ok(script, SUB="auto-restart") == "not\n"


def test_what_is_not_needed_goes_and_the_last_one_stays(tmp_path: Path) -> None:
    prepare(tmp_path, first=False)
    (tmp_path / "opt/3/bin").mkdir(parents=True)
    (tmp_path / "opt/3/.nixlet-stamp").touch()
    # An environment of somebody else's, as in /opt itself.
    (tmp_path / "opt/mine").mkdir()
    (tmp_path / "opt/mine/pyvenv.cfg").touch()
    variables = {"T": str(tmp_path), "TOP": str(ROOT)}
    ok(f"{PLACES}tidy", **variables)
    assert {path.name for path in (tmp_path / "opt").iterdir() if path.is_dir()} == {"1", "mine"}
    for number in ("2", "3"):
        prepare_again = tmp_path / "opt" / number / "bin"
        prepare_again.mkdir(parents=True)
        (prepare_again.parent / ".nixlet-stamp").touch()
    # Something still runs from 3.
    with subprocess.Popen(["sh", "-c", f"sleep 100 # {tmp_path}/opt/3/bin/python"], start_new_session=True) as process:
        try:
            ok(f'{PLACES}point_at "$opt/2/bin/nixlet"; tidy; tidy', **variables)
        finally:
            os.killpg(process.pid, 9)
    assert {path.name for path in (tmp_path / "opt").iterdir() if path.is_dir()} == {"1", "2", "3", "mine"}
    ok(f"{PLACES}tidy", **variables)
    assert {path.name for path in (tmp_path / "opt").iterdir() if path.is_dir()} == {"1", "2", "mine"}


def test_a_version_whose_removal_was_cut_off_goes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    prepare(tmp_path, first=False)
    variables = {"T": str(tmp_path), "TOP": str(ROOT)}
    done = shell(f"{PLACES}rm() {{ command rm -f $2/.nixlet-stamp; kill -9 $$; }}; remove_version $opt/2", **variables)
    assert done.returncode == -9
    assert not (tmp_path / "opt/2/.nixlet-stamp").exists()
    ok(f"{PLACES}remove_unfinished", **variables)
    assert {path.name for path in (tmp_path / "opt").iterdir()} == {"1"}
    (tmp_path / "opt/2").mkdir()
    (tmp_path / "opt/2/mine").touch()
    script = f"{PLACES}python=python3 version=2 top={ROOT}; remove_unfinished; build_version"
    done = shell(script, **variables)
    assert done.returncode == 125
    assert f"{tmp_path}/opt/2 is there, and was not made by this installer" in done.stderr
    assert (tmp_path / "opt/2/mine").exists()


def test_what_is_taken_back_needs_nobody_who_listens(tmp_path: Path) -> None:
    """A session that ends takes its terminal along, and then sends the signal."""
    prepare(tmp_path, first=False)
    master, slave = os.openpty()
    script = f"{PLACES}new_unit=$units/.n; trap 'exit 129' HUP; trap 'leave \"$?\"' EXIT; put_in_force; echo; read -r _; exit 1"
    libraries = "".join(
        f". {ROOT}/scripts/lib/{name}.sh; " for name in ("packages", "environment", "service", "installing")
    )
    (tmp_path / "units/.n").write_text("two\n")
    with subprocess.Popen(
        ["dash", "-euc", libraries + script],
        env={"PATH": os.environ["PATH"], "T": str(tmp_path), "TOP": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=slave,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        assert in_force(tmp_path)[0] == "2/bin/nixlet"
        os.close(slave)
        os.close(master)
        process.send_signal(1)
        assert process.wait(60) in {1, 129}
    assert in_force(tmp_path) == ("1/bin/nixlet", "one\n", "A=1\n")
    assert not (tmp_path / "opt/.before").exists()


@pytest.mark.parametrize(
    ("target", "own"),
    [("opt/1/bin/nixlet", True), ("gone/bin/nixlet", True), ("mine/bin/nixlet", False), ("mine/nixlet", False)],
)
def test_only_a_link_of_an_installers_is_replaced(tmp_path: Path, target: str, own: bool) -> None:
    prepare(tmp_path, first=True)
    (tmp_path / "mine/bin").mkdir(parents=True)
    for name in ("mine/bin/nixlet", "mine/nixlet"):
        (tmp_path / name).touch()
    (tmp_path / "bin/nixlet").symlink_to(tmp_path / target)
    done = shell(f"{PLACES}id() {{ echo 0; }}; check_machine", T=str(tmp_path), TOP=str(ROOT))
    assert done.returncode == (0 if own else 125), done.stderr
    assert own or "no link of this installer's" in done.stderr


def test_a_start_is_waited_for_by_a_clock_that_nobody_sets() -> None:
    script = (
        "count=0; property() { case $2 in NRestarts) echo 0 ;; ActiveState) echo activating ;; *) echo x ;; esac; };"
        " date() { echo 9999999999; }; sleep() { count=$((count + 1)); if [ $count = 30 ]; then echo waits; exit 7; fi; };"
        " await_ready nixlet y 300"
    )
    done = shell(script)
    assert (done.returncode, done.stdout) == (7, "waits\n"), done.stderr
    assert shell(script.replace("300", "0")).returncode == 1
    # A systemd that starts itself anew says nothing for a moment.
    assert shell(script.replace("echo 0", ":")).stdout == "waits\n"


def uninstall(directory: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    """Run what takes an installation away that is at places of its own."""
    places = {name: str(directory / name) for name in ("opt", "bin", "units", "config", "share")}
    script = (ROOT / "deploy/uninstall.sh").read_text()
    # No systemd is asked, and whoever runs this may be anybody.
    head = "systemctl() { :; }; id() { echo 0; };" + "".join(
        f"{name}={path};" for name, path in {**places, **more}.items()
    )
    return subprocess.run(["dash", "-c", head + script], capture_output=True, text=True, check=False)


def program(directory: Path, script: str) -> None:
    """What the link leads to: says which words it got, and does what the script does."""
    file = directory / "opt/1/bin/nixlet"
    file.write_text(f'#!/bin/sh\necho "$@" >>{directory}/called\n{script}\n')
    file.chmod(0o755)


def test_taken_away_is_what_the_installer_made_and_nothing_else(tmp_path: Path) -> None:
    """Also where the versions lie among what others have, as in /opt."""
    prepare(tmp_path, first=False)
    program(tmp_path, "case $1 in config) cat <<E\nexample\nE\nesac")
    for name in ("opt/mine/file", "opt/2.old", "config/config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine\n")
    # What an installation that was killed left: one has the token.
    for name in ("opt/.before/variables", "opt/half/bin/python", "opt/packages", "opt/current"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "opt/.unfinished").write_text(f"{tmp_path}/opt/half\n")
    done = uninstall(tmp_path)
    assert done.returncode == 0, done.stderr
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir())
    assert left == ["called", "config/config.yaml", "opt/2.old", "opt/mine/file"]
    assert f"Kept: what others have in {tmp_path}/opt\n" in done.stdout
    assert (
        f"\nuninstall --unit {tmp_path}/units/nixlet.service --ignore-missing --yes\n"
        in (tmp_path / "called").read_text()
    )


def test_a_node_is_not_forgotten_where_it_cannot_be_taken_away(tmp_path: Path) -> None:
    prepare(tmp_path, first=False)
    (tmp_path / "bin/nixlet").unlink()
    done = uninstall(tmp_path)
    assert done.returncode == 125
    assert f"{tmp_path}/bin/nixlet is not there, which alone can take away" in done.stderr
    assert (tmp_path / "units/nixlet.service").exists()
    # The other way round: nothing says where the node is, and there is one where they are by themselves.
    (tmp_path / "bin/nixlet").symlink_to(tmp_path / "opt/1/bin/nixlet")
    (tmp_path / "units/nixlet.service").unlink()
    program(tmp_path, "exit 0")
    done = uninstall(tmp_path)
    assert done.returncode == 125
    assert "a node's data are" in done.stderr
    assert (tmp_path / "called").read_text() == "uninstall\n"
    assert (tmp_path / "bin/nixlet").is_symlink()
    program(tmp_path, "exit 3")
    assert uninstall(tmp_path).returncode == 0
    assert not (tmp_path / "bin/nixlet").is_symlink()


@pytest.mark.parametrize("other", ["the same node", "another node", ""])
def test_a_node_that_two_services_start_stays_with_the_other_one(tmp_path: Path, other: str) -> None:
    """As a second one that was installed without a directory of its own, and never got ready."""
    prepare(tmp_path, first=False)
    (tmp_path / "units/nixlet-two.service").write_text("two\n")
    program(tmp_path, f"case \"$3 $4\" in *two.service' ') echo {other} ;; *' ') echo the same node ;; esac")
    done = uninstall(tmp_path)
    assert done.returncode == 0, done.stderr
    taken = f"uninstall --unit {tmp_path}/units/nixlet.service --ignore-missing --yes\n"
    assert (taken in (tmp_path / "called").read_text()) == (other != "the same node")
    kept = f"Kept: the node with all that it made, which {tmp_path}/units/nixlet-two.service starts as well.\n"
    assert (kept in done.stdout) == (other == "the same node")
    assert not (tmp_path / "units/nixlet.service").exists()
    assert (tmp_path / "units/nixlet-two.service").exists()


def test_an_installation_that_runs_is_not_taken_away(tmp_path: Path) -> None:
    prepare(tmp_path, first=False)
    with (tmp_path / "opt/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = uninstall(tmp_path)
    assert done.returncode == 125
    assert "an installation of nixlet is running" in done.stderr
    assert in_force(tmp_path)[0] == "1/bin/nixlet"


def piped(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": os.environ["PATH"], **variables}
    script = (ROOT / "install.sh").read_text()
    argv = [shutil.which("dash") or "dash", "-s", "-", *arguments]
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


@pytest.mark.parametrize("source", ["/", "git+file:///nowhere", "https://127.0.0.1:9/x.git", "git@127.0.0.1:x"])
def test_a_checksum_that_nothing_is_compared_with_is_refused(source: str) -> None:
    done = piped(INSTALL_NIXLET_SOURCE=source, INSTALL_NIXLET_SHA256="0" * 64)
    assert done.returncode == 125
    assert f"error: INSTALL_NIXLET_SHA256 is the checksum of an archive, and {source} is none" in done.stderr


@pytest.mark.parametrize("source", ["git+file:///nowhere", "https://127.0.0.1:9/x.tar", "http://127.0.0.1:9/x.tar"])
def test_nothing_is_fetched_where_nothing_may_be(source: str) -> None:
    done = piped(INSTALL_NIXLET_SOURCE=source, INSTALL_NIXLET_SHA256="", INSTALL_NIXLET_SKIP_DOWNLOAD="true")
    assert done.returncode == 125
    assert f"error: INSTALL_NIXLET_SKIP_DOWNLOAD is set, and {source} would have to be fetched" in done.stderr


def test_a_checkout_is_found_whatever_cd_is_told(tmp_path: Path) -> None:
    for place in ("here", "elsewhere/checkout"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "here/checkout").symlink_to(ROOT)
    environment = {"PATH": os.environ["PATH"], "CDPATH": str(tmp_path / "elsewhere"), "INSTALL_NIXLET_VERSION": "9"}
    argv = ["dash", "checkout/install.sh", "server"]
    done = subprocess.run(argv, cwd=tmp_path / "here", env=environment, capture_output=True, text=True, check=False)
    assert f"error: INSTALL_NIXLET_VERSION asks for 9, and {ROOT} is nixlet" in done.stderr


def test_a_script_that_was_cut_off_does_nothing() -> None:
    """As curl hands it on when the connection breaks."""
    script = (ROOT / "install.sh").read_bytes()
    whole = subprocess.run(["dash", "-s", "-", "agent"], input=script, capture_output=True, check=False)
    assert b"nothing says where" in whole.stderr
    assert script.endswith(b"exit; }\n")
    for length in range(len(script) - 60, len(script) - 1):
        done = subprocess.run(["dash", "-s", "-", "agent"], input=script[:length], capture_output=True, check=False)
        assert b"nothing says where" not in done.stderr, script[:length][-20:]


class _Redirecting(http.server.BaseHTTPRequestHandler):
    """Leads from https:// to http://, where anybody may answer."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        secure = isinstance(self.connection, ssl.SSLSocket)
        self.asked.append(f"{'https' if secure else 'http'} {self.path}")
        if secure:
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.path[1:]}/x.tar.gz")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def redirecting(tmp_path: Path) -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """An address that leads to http://, the variables with which curl, wget and git trust it, and what was asked."""
    authority = registries.Authority(tmp_path / "tls")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue("server"))
    _Redirecting.asked.clear()
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Redirecting) for _ in range(2)]
    servers[0].socket = context.wrap_socket(servers[0].socket, server_side=True)
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    (tmp_path / ".wgetrc").write_text(f"ca_certificate={authority.certificate}\n")
    trust = {"CURL_CA_BUNDLE": str(authority.certificate), "GIT_SSL_CAINFO": str(authority.certificate), "HOME": str(tmp_path)}  # fmt: skip
    yield f"https://localhost:{servers[0].server_port}/{servers[1].server_port}", trust, _Redirecting.asked
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("fetcher", ["curl", "wget", "git"])
def test_nobody_is_led_to_where_anybody_may_answer(
    redirecting: tuple[str, dict[str, str], list[str]], tmp_path: Path, fetcher: str
) -> None:
    address, trust, asked = redirecting
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "mktemp", "rm", "sha256sum", "cut", "tail", fetcher):
        (programs / name).symlink_to(shutil.which(name) or "")
    source = f"git+{address}" if fetcher == "git" else address
    done = piped(**trust, PATH=str(programs), INSTALL_NIXLET_SOURCE=source)
    assert done.returncode == 125
    assert "could not be fetched: see above" in done.stderr
    assert {line.split()[0] for line in asked} == {"https"}
    # What it says of that is there to be seen.
    assert {"curl": "http", "wget": "redirect", "git": "fatal"}[fetcher] in done.stderr.partition("error: ")[0]
    if fetcher != "git":
        # Where the checksum says what it is, it may come from anywhere.
        piped(**trust, PATH=str(programs), INSTALL_NIXLET_SOURCE=source, INSTALL_NIXLET_SHA256="0" * 64)
        assert asked[-1] == "http /x.tar.gz"


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
    assert re.fullmatch(rf".* {tmp_path}/tmp/\S+/install.sh agent a b \[\]\n", done.stdout)
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
