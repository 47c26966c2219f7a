"""What the parser reads by itself, click reads alike; and what it leaves to click is not well-formed."""

import os
from collections.abc import Iterator, Sequence
from unittest import mock

import hypothesis
import pytest
from hypothesis import strategies as st

from nixlet import errors
from nixlet.cli import app, clickadapter, grammar, parser, streams, verbs

#: Values as people give them, and what could be taken for something else.
VALUES = ("", "-", "--", "a", "0", "-1", "007", "a=b", "-x", "--all", "bridge", "json", "true", "ps", "ä", "a b")

#: Variables that options have.
VARIABLES = ("NIXLET_STATE_DIR", "NIXLET_DATA_DIR", "CONTAINERD_ADDRESS", "CONTAINERD_NAMESPACE")


def paths() -> Iterator[tuple[tuple[str, ...], grammar.Verb]]:
    """All verbs, by the words that one writes."""
    for name in verbs.SUMMARIES:
        found = verbs.find(name)
        if isinstance(found, grammar.Group):
            yield from (((name, each), verb) for each, verb in found.verbs.items())
        else:
            assert found is not None
            yield (name,), found


PATHS = dict(paths())


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Command lines that have much in common with what their verb takes."""
    path = draw(st.sampled_from(list(PATHS)))
    words = [*draw(st.sampled_from((["--debug"], [], [], []))), *path]
    verb = PATHS[path]
    letters = "".join(flag[1] for option in verb.options for flag in option.flags if len(flag) == 2)
    for _ in range(draw(st.integers(0, 6))):
        option = draw(st.sampled_from([*verb.options, None]))
        value = draw(st.sampled_from([*(option.choices if option else ()), *VALUES]))
        if option is None:
            words.append(value)
        elif letters and draw(st.integers(0, 3)) == 0:
            words.append("-" + draw(st.text(letters, min_size=1, max_size=4)) + draw(st.sampled_from(("", value))))
        else:
            flag = draw(st.sampled_from(option.flags))
            joined = f"{flag}{'=' if flag.startswith('--') else ''}{value}"
            words += draw(st.sampled_from(([flag], [flag, value], [joined])))
    return words


def by_click(arguments: Sequence[str]) -> grammar.Parsed | None:
    try:
        return clickadapter.parse(arguments)
    except (errors.NixletError, streams.Exit):
        return None


@hypothesis.settings(
    max_examples=300, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    arguments=command_lines(),
    environment=st.dictionaries(st.sampled_from(VARIABLES), st.sampled_from(("", "/x")), max_size=2),
)
def test_the_two_agree(arguments: list[str], environment: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(os.environ, {"NIXLET_CONFIG_FILE": os.devnull}):
        for name in (*VARIABLES, verbs.DEBUG_VARIABLE, verbs.COMPLETION_VARIABLE):
            os.environ.pop(name, None)
        os.environ.update(environment)
        ours = parser.parse(arguments, os.environ)
        clicks = by_click(arguments)
    capsys.readouterr()
    if ours is None:
        # click takes "--selinux=-x" for two options, and "--debug --" for nothing; nobody means that.
        odd = any("=-" in each for each in arguments) or arguments[:1] == ["--debug"]
        assert clicks is None or odd
        return
    assert clicks is not None
    assert ours.verb is clicks.verb
    assert ours.values == clicks.values
    assert {name: type(value) for name, value in ours.values.items()} == {
        name: type(value) for name, value in clicks.values.items()
    }
    assert (ours.debug, ours.debug_flag) == (clicks.debug, clicks.debug_flag)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "-itd", "-eA=1", "-e", "B", "--env=C=3", "-p8080:80", "--network", "none", "image", "-x", "--rm"],
        ["run", "--rm", "--", "image", "--", "command"],
        ["exec", "-it", "name", "sh", "-c", "true"],
        ["stop", "a", "-t", "5", "b"],
        ["logs", "name", "-f", "-n10"],
        ["kube", "play", "--wait", "-"],
        ["image", "load"],
        ["server", "--selinux", "--debug=false", "-d", "/data", "--archive-dir", "/a", "--archive-dir=/b"],
        ["ctr", "--state-dir", "/x", "-n", "k8s.io", "--help"],
        ["--debug", "ps", "-aq"],
    ],
)
def test_what_is_well_formed_needs_no_click(arguments: list[str]) -> None:
    parsed = parser.parse(arguments, {})
    assert parsed is not None
    assert parsed.values == clickadapter.parse(arguments).values


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["ps", "--help"],
        ["run", "--help"],
        ["kube"],
        ["kube", "up"],
        ["psx"],
        ["ps", "extra"],
        ["ps", "--no-such"],
        ["ps", "-z"],
        ["ps", "--all=1"],
        ["ps", "--output"],
        ["ps", "--output", "xml"],
        ["stop"],
        ["stop", "a", "-t", "five"],
        ["stop", "a", "-t", "1_000"],
        ["stop", "a", "-t", "-1"],
        ["stop", "a", "-t", "9" * 19],
        ["image", "build", "archive"],
    ],
)
def test_what_click_has_to_tell_is_left_to_it(arguments: list[str]) -> None:
    assert parser.parse(arguments, {}) is None


@pytest.mark.parametrize("text", ["", "-1", "+1", "1_0", "\uff11\uff10", " 5 ", "1.5", "five", "9" * 19, "9" * 5000])
def test_what_is_no_number_is_a_mistake_of_the_command_line(text: str) -> None:
    with pytest.raises(errors.UsageError, match="is no whole number"):
        app.parse(["stop", "--state-dir", "/x", "-t", text, "a"])


@pytest.mark.parametrize("text", ["0", "007", "9" * 18])
def test_a_number(text: str) -> None:
    assert app.parse(["stop", "--state-dir", "/x", "-t", text, "a"]).values["grace"] == int(text)


@pytest.mark.parametrize("name", ["NIXLET_DEBUG", "_NIXLET_COMPLETE"])
def test_variables_that_are_clicks_affair(name: str) -> None:
    assert parser.parse(["ps"], {name: "1"}) is None


def test_a_default_is_found_out_only_where_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIXLET_CONFIG_FILE", "/no/such/file")
    assert parser.parse(["ps", "--state-dir", "/x"], {}) is not None
    assert parser.parse(["ps"], {"NIXLET_STATE_DIR": "/x"}) is not None
    # Also where something else is wrong.
    assert parser.parse(["ps", "extra"], {}) is None
    with pytest.raises(errors.UsageError, match="/no/such/file"):
        parser.parse(["ps"], {})


def test_every_verb_gets_what_it_takes() -> None:
    """What is declared is what the function is called with."""
    for path, verb in PATHS.items():
        names = [option.name for option in verb.options] + [argument.name for argument in verb.arguments]
        assert len(names) == len(set(names)), path
        flags = [flag for option in verb.options for flag in option.flags]
        assert len(flags) == len(set(flags)), path
        assert all(not each.several for each in verb.arguments[:-1]), path
        assert verb.text, path


def test_debug_before_the_verb_is_for_the_node_too() -> None:
    assert app.parse(["--debug", "server"]).values["debug"] is True
    assert app.parse(["--debug", "server", "--debug=false"]).values["debug"] == "false"
    assert "debug" not in app.parse(["--debug", "ps", "--state-dir", "/x"]).values
