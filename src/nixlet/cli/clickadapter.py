"""click, for what the parser leaves to it: help, usage errors and shell completion, made from the verbs' declarations."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from nixlet import errors
from nixlet.cli import completion, grammar, parser, streams, verbs

#: How much an option that is meant has in common with what was written.
_ALIKE = 0.7


def parse(arguments: Sequence[str]) -> grammar.Parsed:
    """Read a command line.

    Raises:
        Exit: There was help or a completion to print, and it was.
        NixletError: It is not well-formed; or a default can't be found out.
    """
    with _translated():
        parsed = root().main(
            args=list(arguments),
            prog_name="nixlet",
            complete_var=verbs.COMPLETION_VARIABLE,
            standalone_mode=False,
        )
    if isinstance(parsed, grammar.Parsed):
        return parsed
    # Help ends like that.
    raise streams.Exit(parsed if isinstance(parsed, int) else 0)


def root() -> click.Group:
    """The program."""
    debug = click.Option(["--debug"], is_flag=True, envvar=verbs.DEBUG_VARIABLE, help="Log more, and print tracebacks.")
    return _Program(
        "nixlet",
        callback=lambda **_: None,
        params=[debug],
        no_args_is_help=False,
        help="A container node for Nix users: root file systems are store paths, a container start is one mount.",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


class _Program(click.Group):
    """All verbs; those that aren't meant are not looked at."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(verbs.SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        found = verbs.find(cmd_name)
        if isinstance(found, grammar.Group):
            made = {name: _verb(name, each) for name, each in found.verbs.items()}
            return click.Group(cmd_name, made, help=found.text, no_args_is_help=False)
        return None if found is None else _verb(cmd_name, found)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(verb, summary) for verb, (_, summary) in verbs.SUMMARIES.items()])


class _Verb(click.Command):
    """A verb that other tools have as well, with options that this one lacks and that people will try."""

    def __init__(self, *args: Any, foreign: Mapping[str, str], **kwargs: Any) -> None:  # noqa: ANN401 (click's)
        super().__init__(*args, **kwargs)
        self._foreign = foreign

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            hint = self._foreign.get(error.option_name)
            if hint is None:
                raise
            raise errors.UsageError(f"{ctx.command_path} has no {error.option_name}", hint=hint) from error


class _Number(click.ParamType[int]):
    """The parser's numbers; click's own are all that int() takes."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401 (click's)
        found = parser.number(str(value))
        return self.fail(f"{str(value)[:80]!r} is no whole number", param, ctx) if found is None else found


def _verb(name: str, verb: grammar.Verb) -> click.Command:
    def parsed(**values: object) -> grammar.Parsed:
        outermost = click.get_current_context().find_root()
        said = outermost.get_parameter_source("debug") is click.core.ParameterSource.COMMANDLINE
        return grammar.Parsed(verb, values, debug=outermost.params["debug"], debug_flag=said)

    return _Verb(
        name,
        callback=parsed,
        params=[*map(_option, verb.options), *map(_argument, verb.arguments)],
        help=verb.text,
        foreign=verb.foreign,
        add_help_option=not verb.passes_unknown,
        context_settings={
            "allow_interspersed_args": verb.interspersed,
            "ignore_unknown_options": verb.passes_unknown,
        },
    )


def _option(option: grammar.Option) -> click.Option:
    flag = isinstance(option, grammar.Flag)
    more: dict[str, Any] = {}
    if isinstance(option, grammar.Truth):
        more = {"is_flag": False, "flag_value": "true"}
    elif flag:
        more = {"is_flag": True}
    # A line that is being completed needs none that has to be found out, nor its errors.
    if not (callable(option.default) and verbs.COMPLETION_VARIABLE in os.environ) and option.default is not None:
        more["default"] = option.default
    return click.Option(
        [*option.flags, option.name],
        type=None if flag else _Number() if isinstance(option, grammar.Number) else _text(option.choices),
        metavar=option.metavar,
        multiple=isinstance(option, grammar.Values),
        envvar=option.variable or None,
        required=option.required,
        hidden=option.hidden,
        help=_help(option),
        **more,
    )


def _help(option: grammar.Option) -> str:
    default = option.default_text or (option.default if isinstance(option.default, str) else "")
    notes = [f"env var: {option.variable}"] if option.variable else []
    notes += [f"default: {default}"] if default else []
    return f"{option.text}  [{'; '.join(notes)}]" if notes else option.text


def _argument(argument: grammar.Argument) -> click.Argument:
    more: dict[str, Any] = {} if argument.default is None else {"default": argument.default}
    return click.Argument(
        [argument.name],
        nargs=-1 if argument.several else 1,
        required=argument.required,
        type=_text(argument.choices),
        shell_complete=_containers if argument.completes == "containers" else None,
        **more,
    )


def _text(choices: Sequence[str]) -> "click.ParamType[Any]":
    return click.Choice(choices) if choices else click.STRING


def _containers(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return completion.containers(context.params.get("state_dir"), incomplete)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Tell click's errors in our form; their exit status stays."""
    try:
        yield
    except click.exceptions.Exit as ended:
        raise streams.Exit(ended.exit_code) from None
    except SystemExit as ended:
        # A shell asked, and has its answer.
        raise streams.Exit(ended.code if isinstance(ended.code, int) else 1) from None
    except click.UsageError as error:
        raise _usage_error(error) from error
    except click.ClickException as error:
        raise errors.NixletError(_plain(error.format_message())) from error


def _usage_error(error: click.UsageError) -> errors.UsageError:
    said, advice = _plain(error.format_message()), ""
    if isinstance(error, click.NoSuchOption):
        # What has little in common with a word was not meant by it.
        near = difflib.get_close_matches(error.option_name, error.possibilities or (), cutoff=_ALIKE)
        said, advice = f"there is no option {error.option_name}", f"did you mean {' or '.join(near)}? " if near else ""
    if error.ctx is not None:
        usage = " ".join(error.ctx.get_usage().split())
        advice += f"{usage[0].lower()}{usage[1:]}; {error.ctx.command_path} --help says more"
    elif not advice:
        # click doesn't always say which verb it was.
        advice = "nixlet VERB --help says more"
    return errors.UsageError(said, hint=advice)


def _plain(text: str) -> str:
    """A sentence of click's as ours begin and end."""
    text = re.sub(r"\s+", " ", text).strip().removesuffix(".")
    return text[:1].lower() + text[1:]


def completion_script(shell: str) -> str:
    """What a shell has to run so that it completes nixlet's command lines."""
    from click import shell_completion

    made = shell_completion.get_completion_class(shell)
    assert made is not None
    return made(root(), {}, "nixlet", verbs.COMPLETION_VARIABLE).source()
