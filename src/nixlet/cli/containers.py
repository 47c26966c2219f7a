"""``nixlet ps``, ``stop``, ``rm``: containers that are there."""

from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


@grammar.verb(
    options.STATE_DIR,
    options.OUTPUT,
    grammar.Flag("--all", "-a", name="everything", text="Also those that have ended."),
    grammar.Flag("--quiet", "-q", text="Only their IDs."),
)
def ps(state_dir: str, output: str, *, everything: bool, quiet: bool) -> None:
    """List containers."""
    from nixlet.cli import link, table

    with link.connected(state_dir) as node:
        found = node.call("ListContainers", {"all": everything})["containers"]
    if quiet:
        for each in found:
            print(each["id"])
    elif output == "json":
        options.print_json(found)
    else:
        table.echo(("CONTAINER ID", "IMAGE", "STATUS", "CREATED", "NAME", "POD"), [_row(each) for each in found])


def _row(container: "dict[str, str]") -> "Sequence[str]":
    import datetime

    local = datetime.datetime.fromisoformat(container["created"]).astimezone()
    return (
        container["id"][:12],
        _short(container["image"]),
        container["state"],
        f"{local:%Y-%m-%d %H:%M:%S}",
        container["name"],
        container["pod"],
    )


def _short(image: str) -> str:
    """An image's reference without the hash of its store path."""
    head, slash, name = image.rpartition("/")
    if head.startswith("nix:0/") and len(name) > 33 and name[32] == "-":
        return f"nix:0…{slash}{name[:6]}…{name[32:]}"
    return image


@grammar.verb(
    options.STATE_DIR,
    grammar.Number(
        "--time", "-t", name="grace", default_text="as its pod says, or 10", text="Seconds until it is killed."
    ),
    grammar.Argument("containers", several=True, completes="containers"),
)
def stop(containers: tuple[str, ...], state_dir: str, grace: int | None) -> int:
    """Stop containers, and the network of pods that have none running any more."""
    return _changed(state_dir, "StopContainers", containers, grace=grace)


@grammar.verb(
    options.STATE_DIR,
    grammar.Flag("--force", "-f", text="Also when it is running."),
    grammar.Argument("containers", several=True, completes="containers"),
)
def rm(containers: tuple[str, ...], state_dir: str, *, force: bool) -> int:
    """Remove containers, and pods that have none any more."""
    return _changed(state_dir, "RemoveContainers", containers, force=force)


def _changed(state_dir: str, method: str, containers: tuple[str, ...], **parameters: object) -> int:
    """Have containers changed, and tell of each: its name, or why not; the exit status is that of the first that failed."""
    from nixlet.cli import link, report
    from nixlet.varlink import wire

    status = 0
    with link.connected(state_dir) as node:
        for reply in node.stream(method, {"containers": containers, **parameters}):
            if "failure" in reply:
                error = wire.error_of(wire.FAILED, reply["failure"], node.peer)
                report.print_error(error)
                status = status or error.exit_code
            else:
                print(reply["container"])
    return status
