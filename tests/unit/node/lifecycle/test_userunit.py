"""The unit of an ordinary user's node: where it is, and what stands in it."""

import shlex
import sys

import pytest

from nixlet.node.lifecycle import userunit


@pytest.mark.parametrize(
    ("environment", "where"),
    [
        ({"HOME": "/home/ada"}, "/home/ada/.config/systemd/user/nixlet.service"),
        ({"HOME": "/home/ada", "XDG_CONFIG_HOME": "/c"}, "/c/systemd/user/nixlet.service"),
    ],
)
def test_where_it_is(environment: dict[str, str], where: str) -> None:
    assert userunit.path(environment) == where


def test_what_it_starts_and_with_which_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", '/opt/a b/$HOME/100%/"python"')
    lines = dict(line.partition("=")[::2] for line in userunit.render({"PATH": "/home/a b/%h/bin:/bin"}).splitlines())
    # As systemd undoes it: quotes, then specifiers, then variables.
    words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(lines["ExecStart"])]
    assert words == ['/opt/a b/$HOME/100%/"python"', "-P", "-m", "nixlet", "server", "--rootless"]
    assert lines["Environment"] == '"PATH=/home/a b/%%h/bin:/bin"'
