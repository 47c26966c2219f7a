"""The command line's frame: what was meant is read, and done, and errors become a sentence and an exit status."""

import os

from nixlet import errors
from nixlet.cli import grammar, parser, report, streams
from nixlet.encoding import utf8

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def run(arguments: "Sequence[str]") -> int:
    """Run the command line; the exit status."""
    debug = False
    try:
        parsed = parse(arguments)
        # A node that is to log more says more itself.
        debug = parsed.debug or parsed.values.get("debug") not in {None, False, "false"}
        return parsed.verb.run(**parsed.values) or 0
    except streams.Exit as ended:
        return ended.status
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            raise
        told = error if isinstance(error, errors.NixletError) else report.unforeseen(error)
        report.print_error(told)
        return told.exit_code


def parse(arguments: "Sequence[str]") -> grammar.Parsed:
    """Read the command line.

    Raises:
        Exit: Help or a completion was asked for, and is printed.
        NixletError: It is not well-formed; or a default can't be found out.
    """
    _check_arguments(arguments)
    parsed = parser.parse(arguments, os.environ)
    if parsed is None:
        from nixlet.cli import clickadapter

        parsed = clickadapter.parse(arguments)
    # "nixlet --debug server" says it for the node as well.
    if parsed.debug_flag and parsed.values.get("debug", "") is None:
        parsed.values["debug"] = True
    return parsed


def _check_arguments(arguments: "Sequence[str]") -> None:
    """Refuse what can't be handed on: names, paths and texts go to containerd as UTF-8.

    Raises:
        UsageError: An argument is something else.
    """
    for text in arguments:
        if not utf8.is_valid(text):
            raise errors.UsageError(
                f"the argument {os.fsencode(text)!r} is not UTF-8", hint="convert it, or rename what it names"
            )
