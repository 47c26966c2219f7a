"""``nixlet certificate``: a cluster's certificates on this machine, looked at and made anew."""

from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    import datetime
    from collections.abc import Sequence

    from nixlet.cluster import findings
    from nixlet.cluster.layout import Layout

_SERVICES = grammar.Values(
    "--service",
    "-s",
    name="services",
    metavar="NAME",
    text="Only those of a service, such as api-server, kubelet or admin; may be given several times.",
)


def _layout(data_dir: str) -> "Layout":
    import os

    from nixlet.cluster import layout

    # Nothing that survives is anywhere else.
    return layout.Layout(os.path.abspath(data_dir), "")


@grammar.verb(options.DATA_DIR, options.OUTPUT, _SERVICES)
def check(data_dir: str, output: str, services: "Sequence[str]") -> int:
    """List a node's certificates with their ends, and what is wrong with them; nothing is changed.

    The exit status is 0 when all can be used, also where one ends soon, and 1 otherwise.
    """
    import datetime

    from nixlet.cluster import findings, standing

    places = _layout(data_dir)
    now = datetime.datetime.now(datetime.UTC)
    found = standing.check(places, now)
    if services:
        known = {each.service for each in found}
        for service in services:
            if service not in known:
                from nixlet import errors

                raise errors.UsageError(
                    f"no certificates belong to a service {service!r}", hint=f"there are {', '.join(sorted(known))}"
                )
        found = [each for each in found if each.service in services]
    if output == "json":
        options.print_json([_as_json(each) for each in found])
    else:
        _show(found, places, now)
    return 0 if all(each.state in {findings.State.VALID, findings.State.ENDING} for each in found) else 1


def _as_json(finding: "findings.Finding") -> dict[str, object]:
    begins, ends, subject = finding.not_before, finding.not_after, finding.subject
    return {
        "service": finding.service,
        "file": finding.file,
        "subject": subject and subject.common_name,
        "groups": list(subject.organizations) if subject else [],
        "names": list(subject.names) if subject else [],
        "not_before": begins and begins.isoformat(),
        "not_after": ends and ends.isoformat(),
        "state": str(finding.state),
        "detail": finding.detail,
    }


def _show(found: "Sequence[findings.Finding]", places: "Layout", now: "datetime.datetime") -> None:
    import os

    from nixlet.cli import table

    rows = []
    for each in found:
        subject = each.subject.common_name if each.subject else ""
        ends = each.not_after.strftime("%Y-%m-%d") if each.not_after else ""
        left = f"{(each.not_after - now).days} days" if each.not_after and each.not_after > now else ""
        file = os.path.relpath(each.file, places.data_dir)
        rows.append((each.service, file, subject, ends, left, str(each.state), each.detail))
    table.echo(("SERVICE", "FILE", "FOR", "ENDS", "LEFT", "STATE", ""), rows)


@grammar.verb(options.DATA_DIR, options.OUTPUT, _SERVICES)
def rotate(data_dir: str, output: str, services: "Sequence[str]") -> None:
    """Give a server's certificates new keys, and a year from now on.

    The certificate authorities stay, and so does what service accounts are known by. What runs goes on with the old ones: start the server anew. An
    administrator's kubeconfig that was copied elsewhere goes on as well, until its certificate ends.
    """
    import datetime
    import sys

    from nixlet.cluster import standing
    from nixlet.host import files
    from nixlet.node.settings import config

    places = _layout(data_dir)
    rotated = standing.rotate(places, services, datetime.datetime.now(datetime.UTC))
    running = bool(files.holder(config.Layout(places.data_dir, "").lock))
    made = [each.file for each in rotated.changes]
    if output == "json":
        options.print_json({"rotated": made, "left": rotated.left, "restart": running and bool(made)})
    else:
        for file in made:
            print(file)
    for file in rotated.left:
        print(f"warning: {file} is missing or can't be read: the server's next start makes it", file=sys.stderr)
    if made:
        now_or_later = "restart it: until then it goes on with the old ones" if running else "its next start uses them"
        print(
            f"{len(made)} certificates are new; the server {'runs, ' if running else 'does not run: '}{now_or_later}",
            file=sys.stderr,
        )


certificate = grammar.Group(
    "Look at a cluster's certificates on this machine, and make them anew.", {"check": check, "rotate": rotate}
)
