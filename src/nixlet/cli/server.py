"""``nixlet server``: run a node."""

import click

from nixlet.cli import options
from nixlet.node import config

_DEFAULTS = config.Settings()


@click.command()
@options.node_directories
@click.option(
    "--snapshotter", default="nix", show_default=True, help="containerd's snapshotter for images and containers."
)
@click.option("--containerd", default="containerd", show_default=True, help="The containerd program.")
@click.option("--runc", default="runc", show_default=True, help="The OCI runtime program.")
@click.option(
    "--pause", default="catatonit", show_default=True, help="The static program that holds a pod's namespaces."
)
@click.option(
    "--cni-bin-dir",
    "cni_bin_dirs",
    multiple=True,
    help="Where the CNI plugins are.  [default: /opt/cni/bin, /usr/lib/cni, …]",
)
@click.option("--pod-cidr", default=_DEFAULTS.pod_cidr, show_default=True, help="The addresses that pods get.")
@click.option("--bridge", default=_DEFAULTS.bridge, show_default=True, help="The bridge that pods are attached to.")
@click.option(
    "--archive-dir",
    "archive_dirs",
    multiple=True,
    help="Where nix:0 references may name archives outside the store.  [default: DATA_DIR/agent/images, /tmp]",
)
@click.option("--debug", is_flag=True, envvar="NIXLET_DEBUG", help="Log more.")
def server(**given: object) -> None:
    """Run a node: containerd with the nix snapshotter, and the CRI image service.

    SIGTERM and SIGINT take it down; pods go on, and the next start takes them up again.
    """
    import asyncio

    import uvloop

    from nixlet.node import server as node
    from nixlet.telemetry import logs

    if not given["cni_bin_dirs"]:
        del given["cni_bin_dirs"]
    settings = config.Settings(**given)  # type: ignore[arg-type]
    logs.configure(debug=settings.debug)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(node.run(settings))
