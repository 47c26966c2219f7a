"""``nixlet token``: what nodes join a cluster by."""

from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    import datetime
    from collections.abc import Sequence

    from nixlet.cluster.kubeconfigs import Kubeconfig

_KUBECONFIG = grammar.Value(
    "--kubeconfig",
    metavar="FILE",
    text="Who one is, and to which cluster.",
    default_text="the server's administrator, DATA_DIR/server/cred/admin.kubeconfig",
)


def _kubeconfig(data_dir: str, file: str | None) -> "Kubeconfig":
    import os

    from nixlet import errors
    from nixlet.cluster import kubeconfigs, layout

    path = file or layout.Layout(os.path.abspath(data_dir), "").cred("admin.kubeconfig")
    if not file and not os.path.exists(path):
        if not os.access(data_dir, os.X_OK):
            raise errors.PermissionDeniedError(f"{data_dir} can't be looked into", hint="run it as root")
        raise errors.FailedPreconditionError(
            f"there is no cluster in {data_dir}: no server was started there yet",
            hint="--data-dir says where another one is; --kubeconfig names a file that leads to one",
        )
    return kubeconfigs.read(path)


def _authority(config: "Kubeconfig") -> bytes:
    from nixlet.host import files

    if not config.authority:
        return config.authority_data
    with files.refusing(f"{config.authority} can't be read"), open(config.authority, "rb") as file:
        return file.read()


def _duration(text: str) -> "datetime.timedelta | None":
    """How long a token is good; None: for ever."""
    import datetime
    import re

    from nixlet import errors

    if text in {"0", "0s"}:
        return None
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    if not re.fullmatch(r"([0-9]{1,6}[dhms])+", text):
        raise errors.UsageError(f"--ttl {text!r} is no time", hint="such as 24h, 1h30m, or 0 for ever")
    found = datetime.timedelta(
        seconds=sum(int(number) * units[unit] for number, unit in re.findall(r"([0-9]+)([dhms])", text))
    )
    # (years have four digits)
    if not datetime.timedelta() < found < datetime.timedelta(days=365_000):
        raise errors.UsageError(f"--ttl {text} is no time that a token could be good for", hint="0 is for ever")
    return found


@grammar.verb(
    options.DATA_DIR,
    _KUBECONFIG,
    grammar.Value("--ttl", metavar="TIME", default="24h", text="How long it is good, such as 1h30m; 0: for ever."),
    grammar.Value("--description", metavar="TEXT", default="", text="What it is for, in words."),
    grammar.Values("--usages", metavar="NAME", text="What it is for: signing, authentication. By default both."),
    grammar.Values(
        "--groups", metavar="NAME", text="The groups of nodes that join by it. By default that of nixlet's nodes."
    ),
    grammar.Argument("token", required=False),
)
def create(
    token: str | None,
    data_dir: str,
    kubeconfig: str | None,
    ttl: str,
    description: str,
    usages: "Sequence[str]",
    groups: "Sequence[str]",
) -> None:
    """Have the cluster know a new bootstrap token, TOKEN or any, and print it as nodes take it, with the hash of the cluster's authority.

    It is a secret: whoever has it can join a node.
    """
    import datetime

    from nixlet import errors
    from nixlet.cluster import tokens
    from nixlet.kubeclient import bootstraptokens, client, endpoint

    lasts = _duration(ttl)
    made = tokens.parse(token) if token else tokens.new_bootstrap()
    if not made.bootstrap:
        raise errors.UsageError("TOKEN is no bootstrap token", hint="nixlet token generate makes one")
    wanted = tuple(part for text in usages for part in text.split(",") if part) or bootstraptokens.USAGES
    given = tuple(part for text in groups for part in text.split(",") if part)
    if not given and bootstraptokens.AUTHENTICATION in wanted:
        given = (bootstraptokens.DEFAULT_GROUP,)
    bootstraptokens.check(wanted, given)
    config = _kubeconfig(data_dir, kubeconfig)
    authority = _authority(config)
    made.check_authority(authority)
    expires = None if lasts is None else datetime.datetime.now(datetime.UTC) + lasts
    with client.Client(endpoint.Endpoint.of_kubeconfig(config)) as there:
        new = bootstraptokens.BootstrapToken(made.user, made.password, description, expires, wanted, given)
        bootstraptokens.add(there, new)
    print(made.full(authority) if authority else made.credentials())


@grammar.verb(options.DATA_DIR, _KUBECONFIG, options.OUTPUT)
def list_(data_dir: str, kubeconfig: str | None, output: str) -> None:
    """List the cluster's bootstrap tokens. Of their secrets nothing is shown."""
    import datetime

    from nixlet.cli import table
    from nixlet.kubeclient import bootstraptokens, client, endpoint

    with client.Client(endpoint.Endpoint.of_kubeconfig(_kubeconfig(data_dir, kubeconfig))) as there:
        found = bootstraptokens.listed(there)
    now = datetime.datetime.now(datetime.UTC)
    if output == "json":
        options.print_json(
            [
                {
                    "id": each.identifier,
                    "description": each.description,
                    "expires": each.expires and each.expires.isoformat(),
                    "usages": list(each.usages),
                    "groups": list(each.groups),
                }
                for each in found
            ]
        )
        return
    rows = [
        (
            each.identifier,
            _left(each.expires, now),
            each.expires.strftime("%Y-%m-%dT%H:%M:%SZ") if each.expires else "never",
            ",".join(each.usages),
            _plain(each.description),
            _plain(",".join(each.groups)),
        )
        for each in found
    ]
    table.echo(("ID", "TTL", "EXPIRES", "USAGES", "DESCRIPTION", "GROUPS"), rows)


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _left(expires: "datetime.datetime | None", now: "datetime.datetime") -> str:
    if expires is None:
        return "forever"
    seconds = int((expires - now).total_seconds())
    if seconds <= 0:
        return "ended"
    return f"{seconds // 3600}h" if seconds >= 7200 else f"{seconds // 60}m" if seconds >= 120 else f"{seconds}s"


@grammar.verb(options.DATA_DIR, _KUBECONFIG, grammar.Argument("tokens", several=True))
def delete(tokens: "Sequence[str]", data_dir: str, kubeconfig: str | None) -> None:
    """Have the cluster forget bootstrap tokens, each named by its ID or as it was printed. Nodes that have joined by them stay."""
    from nixlet.kubeclient import bootstraptokens, client, endpoint

    with client.Client(endpoint.Endpoint.of_kubeconfig(_kubeconfig(data_dir, kubeconfig))) as there:
        for each in tokens:
            print(f"token {bootstraptokens.remove(there, each)} deleted")


@grammar.verb()
def generate() -> None:
    """Print a new bootstrap token that no cluster knows yet: nixlet token create TOKEN has it known."""
    from nixlet.cluster import tokens

    print(tokens.new_bootstrap().credentials())


@grammar.verb(
    options.DATA_DIR,
    grammar.Value("--token", "-t", metavar="SECRET", text="The token that there is, to be sure that it is that one."),
    grammar.Value("--new-token", metavar="SECRET", text="The one that takes its place; by default any."),
)
def rotate(data_dir: str, token: str | None, new_token: str | None) -> None:
    """Give the server another token, and print it. Nodes that have joined stay; those that join need the new one.

    Where the server's own settings name the old one, change them before its next start.
    """
    import os

    from nixlet.cluster import layout, tokens

    print(tokens.rotate(layout.Layout(os.path.abspath(data_dir), ""), old=token or "", new=new_token or ""))


token = grammar.Group(
    "Make, list and remove what nodes join a cluster by.",
    {"create": create, "list": list_, "delete": delete, "generate": generate, "rotate": rotate},
)
