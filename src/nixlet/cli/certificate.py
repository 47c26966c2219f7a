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
    text="Only those of a service, such as api-server, kubelet or admin; several with commas between, or given several times.",
)


def _named(services: "Sequence[str]") -> list[str]:
    # (an empty one is none, and not all of them)
    return [part.strip() for text in services for part in text.split(",")]


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

    from nixlet.cluster import certificates, findings, standing

    places = _layout(data_dir)
    now = datetime.datetime.now(datetime.UTC)
    found, chosen = standing.check(places, now), _named(services)
    certificates.check_services({each.service for each in found}, chosen)
    found = [each for each in found if not chosen or each.service in chosen]
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

    The certificate authorities stay, and so does what service accounts are known by. What runs takes the new ones up by itself, within minutes. The
    administrator's kubeconfig is written anew with the server's next start; until its certificate ends it goes on meanwhile, as copies of it do.
    """
    import datetime
    import sys

    from nixlet.cluster import standing
    from nixlet.host import files
    from nixlet.node.settings import config

    places = _layout(data_dir)
    rotated = standing.rotate(places, _named(services), datetime.datetime.now(datetime.UTC))
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
        later = (
            "what runs takes them up within minutes; restart the server to have the administrator's kubeconfig written anew"
            if running
            else "the server does not run: its next start uses them"
        )
        print(f"{len(made)} certificates are new; {later}", file=sys.stderr)


certificate = grammar.Group(
    "Look at a cluster's certificates on this machine, and make them anew.", {"check": check, "rotate": rotate}
)
