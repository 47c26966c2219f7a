"""The command line's frame: which verbs there are, and how errors look and exit.

A verb's module is imported when the verb runs, so that ``nixlet ps`` doesn't pay for what ``nixlet server`` needs.
"""

import importlib
import os
from collections.abc import Sequence

import click

from nixlet import errors
from nixlet.cli import report
from nixlet.encoding import utf8

#: Verb to module in this package; each module has a click command of the verb's name (dashes as underscores).
_VERBS = {
    "server": ("server", "Run a node: containerd, the snapshotter, the CRI image service"),
    "agent": ("agent", "Run a node without what only a server has"),
    "snapshotter": ("snapshotter", "Run the snapshotter alone, for a containerd that is there already"),
    "kube": ("kube", "Run pods from Kubernetes manifests"),
    "run": ("run", "Run a container"),
    "exec": ("exec", "Run a further process in a container"),
    "attach": ("attach", "Hand a container our terminal, input and signals"),
    "ps": ("containers", "List containers"),
    "logs": ("containers", "Print a container's output"),
    "inspect": ("inspect", "Print all that is known of containers, as JSON"),
    "stats": ("stats", "Show what containers use"),
    "stop": ("containers", "Stop containers"),
    "rm": ("containers", "Remove containers"),
    "images": ("images", "List images"),
    "image": ("image", "Build and load images"),
    "doctor": ("doctor", "Check this machine for a node"),
    "check-config": ("doctor", "The same, by its name in k3s"),
    "config": ("config", "Look at the configuration that a node gives its containerd"),
    "uninstall": ("uninstall", "Take a node away"),
    "ctr": ("passthrough", "Run the real ctr against the node's containerd"),
    "crictl": ("passthrough", "Run the real crictl against the node"),
    "completion": ("completion", "Print the completion for a shell"),
    "version": ("version", "Print versions"),
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"nixlet.cli.{_VERBS[cmd_name][0]}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(verb, summary) for verb, (_, summary) in _VERBS.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, envvar="NIXLET_DEBUG", help="Log more, and print tracebacks.")
@click.pass_context
def _nixlet(context: click.Context, *, debug: bool) -> None:
    """A container node for Nix users: root file systems are store paths, a container start is one mount."""
    context.ensure_object(dict)["debug"] = debug


def run(arguments: Sequence[str]) -> int:
    """Run the command line and turn every error into a sentence and an exit status."""
    # What verbs tell us, who see errors from outside of click.
    frame = {"debug": False}
    try:
        _check_arguments(arguments)
        result = _nixlet.main(args=list(arguments), prog_name="nixlet", standalone_mode=False, obj=frame)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.Abort:
        return 130
    except click.ClickException as error:
        told = report.usage_error(error)
        report.print_error(told)
        return told.exit_code
    except errors.NixletError as error:
        if frame["debug"]:
            raise
        report.print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if frame["debug"]:
            raise
        told = report.unforeseen(error)
        report.print_error(told)
        return told.exit_code
    return result if isinstance(result, int) else 0


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse what can't be handed on: names, paths and texts go to containerd as UTF-8.

    Raises:
        UsageError: An argument is something else.
    """
    for text in arguments:
        if not utf8.is_valid(text):
            raise errors.UsageError(
                f"the argument {os.fsencode(text)!r} is not UTF-8", hint="convert it, or rename what it names"
            )
