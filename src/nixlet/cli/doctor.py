"""``nixlet doctor``, also ``nixlet check-config``: whether a node can run here, and what is in its way."""

import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any

from nixlet.cli import colours, grammar, options, settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nixlet.node.doctor import checks
    from nixlet.node.settings import config

_COLOURS = {
    "ok": colours.GREEN,
    "warning": colours.YELLOW,
    "missing": colours.RED,
    "unknown": colours.MAGENTA,
}


@grammar.verb(
    *settings.OPTIONS,
    grammar.Flag("--json", name="as_json", text="For programs: the same as --output json."),
    options.OUTPUT,
)
@options.asynchronous
async def doctor(*, output: str, as_json: bool, **given: Any) -> int:  # noqa: ANN401 (what the options give)
    """Check this machine for a node with these settings; nothing is changed.

    Each line is something that was looked at: ok; warning: a node runs, but; missing: it doesn't; unknown: it could not be looked at.
    The exit status is 0 when a node can run, 1 when something is missing, 3 when that could not be told.
    """
    return await examine(settings.load(given).settings, as_json=as_json or output == "json")


check_config = doctor


async def examine(wanted: "config.Settings", *, as_json: bool) -> int:
    """Print what a node with these settings would find here; the exit status."""
    from nixlet.node.doctor import checks, rootless

    findings = await rootless.examine(wanted)
    if as_json:
        options.print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        _show(findings)
    return checks.exit_status(findings)


def _show(findings: "Sequence[checks.Finding]") -> None:
    width = max(len(finding.name) for finding in findings)
    group = ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            print(colours.coloured(group, colours.BOLD, stream=sys.stdout))
        status = colours.coloured(f"{finding.status:<7}", _COLOURS[finding.status], stream=sys.stdout)
        print(f"  {status}  {finding.name:<{width}}  {finding.evidence}")
        if finding.remedy:
            print(f"  {'':7}  {'':{width}}  {finding.remedy}")
    missing, unknown = (sum(finding.status == status for finding in findings) for status in ("missing", "unknown"))
    if missing:
        print(f"a node can't run here: {missing} {'thing is' if missing == 1 else 'things are'} missing")
    elif unknown:
        how = ": run it as root" if os.geteuid() != 0 else ""
        print(f"{unknown} {'thing' if unknown == 1 else 'things'} could not be looked at{how}")
    else:
        print("a node can run here")
