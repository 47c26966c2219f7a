"""``nixlet config``: look at the configuration that a node has, and gives its containerd."""

import sys
from typing import TYPE_CHECKING, Any

from nixlet.cli import grammar, options, settings
from nixlet.node.settings import names

if TYPE_CHECKING:
    from nixlet.node.children import rendering
    from nixlet.node.settings import configfile

#: Where k3s keeps things (docs.k3s.io, "Architecture").
_K3S_DATA_DIR = "/var/lib/rancher/k3s"
_K3S_STATE_DIR = "/run/k3s"


@grammar.verb(
    grammar.Value(
        "--version",
        choices=("2", "3", "4"),
        default_text="that which the node's containerd would get; 3 for k3s",
        text="The version of containerd's configuration.",
    ),
    grammar.Value(
        "--for",
        name="whose",
        choices=("nixlet", "k3s"),
        default="nixlet",
        text="Whose containerd: the node's own; or that of k3s, which has its snapshotters compiled in, in k3s's directories.",
    ),
    grammar.Flag("--base", text="Leave templates and drop-ins out."),
    grammar.Value(
        "--output",
        "-o",
        choices=("text", "json"),
        default="text",
        text="The file as it would be written, or what stands in it as JSON.",
    ),
    grammar.Flag("--show-secrets", text="Print passwords and tokens for registries as well."),
    *settings.OPTIONS,
)
@options.asynchronous
async def render(*, version: str | None, whose: str, base: bool, output: str, show_secrets: bool, **given: Any) -> None:  # noqa: ANN401 (what the options give)
    """Print containerd's configuration as a node with these settings would write it; nothing is changed.

    Templates and drop-ins are those in DATA_DIR/agent/etc/containerd. Who makes the cgroups of pods is as at the node's last start.
    """
    configuration = settings.load(given)
    number = int(version) if version else None
    if whose == "k3s":
        rendered = _render_for_k3s(configuration, number or 3)
    else:
        rendered = await _render(configuration, number, user_files=not base)
    if not show_secrets:
        rendered = rendered.without_secrets()
    if output == "json":
        options.print_json(_for_json(rendered.table))
    else:
        sys.stdout.write(rendered.text)


def _for_json(value: object) -> object:
    """What TOML has and JSON hasn't, as the text that TOML has for it: dates, times, and numbers that are none."""
    import datetime
    import math

    if isinstance(value, dict):
        return {key: _for_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_for_json(each) for each in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


async def _render(
    configuration: "configfile.Configuration", version: int | None, *, user_files: bool
) -> "rendering.Rendered":
    from nixlet import errors
    from nixlet.containerd import config as containerd_config
    from nixlet.host import process
    from nixlet.node.children import rendering
    from nixlet.node.requirements import preflight
    from nixlet.node.settings import registries_file

    said = configuration.settings
    layout = said.layout
    if version is None:
        path = preflight.find_program(said.containerd, package="containerd", setting="--containerd, or --version")
        spoken = (await containerd_config.ask(path)).config_version
        version = rendering.choose_version(layout, spoken) if user_files else spoken
    try:
        plugins = preflight.find_cni_plugins(said.cni_bin_dirs)
    except errors.UnavailableError:
        # A node would not start; what it would write can be looked at all the same.
        plugins = said.cni_bin_dirs[0]
    runc = process.find_program(said.runc) or said.runc
    reached = registries_file.read(said.private_registry)
    return rendering.render(
        said,
        layout,
        version=version,
        runc=runc,
        cni_bin_dir=plugins,
        said=reached,
        user_files=user_files,
        looked_at=True,
    )


def _render_for_k3s(configuration: "configfile.Configuration", version: int) -> "rendering.Rendered":
    import os

    from nixlet.node.children import rendering
    from nixlet.node.settings import config as node_config
    from nixlet.node.settings import registries_file

    def unsaid(name: str) -> bool:
        return configuration.origins[name].source == "default"

    said = configuration.settings
    layout = node_config.Layout(
        data_dir=_K3S_DATA_DIR if unsaid("data_dir") else said.data_dir,
        state_dir=_K3S_STATE_DIR if unsaid("state_dir") else said.state_dir,
    )
    plugins = os.path.join(layout.data_dir, "data", "cni") if unsaid("cni_bin_dirs") else said.cni_bin_dirs[0]
    reached = registries_file.read(said.private_registry)
    return rendering.render_for_k3s(said, layout, version=version, cni_bin_dir=plugins, said=reached)


@grammar.verb()
def example() -> None:
    """Print a configuration file that says nothing yet: every key with its meaning and its default, all commented out."""
    print(
        f"# {names.DEFAULT_FILE}: a key is a flag of nixlet server without its dashes. nixlet server --show-config prints what holds."
    )
    print("# Lines to change: take the # before the key away. A restart of the node takes them up.")
    for key, text, value in settings.described():
        print(f"\n# {text}\n#{key}: {value}")


config = grammar.Group(
    "Look at the configuration that a node has, and gives its containerd.", {"render": render, "example": example}
)
