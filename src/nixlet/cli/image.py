"""``nixlet image``: build and load images."""

import os

import click

from nixlet.cli import options


@click.group()
def image() -> None:
    """Build and load images."""


@image.command()
@click.option("--config", required=True, help='The "config" object of an OCI image configuration, as JSON.')
@click.option("--closure", required=True, help="A file of store paths, one a line.")
@click.option("--closure-info", help="The store path that lists the closure, for nodes to realise.")
@click.option("--copy-to-root", help="A JSON list of store paths whose files appear below /.")
@click.option("--from-image", help="The archive of an image to build upon.")
@click.option("--ref", help="The image's name.  [default: nix:0OUTPUT]")
@click.option("--architecture", help="What it runs on, in Go's words.  [default: this machine's]")
@options.output
@click.argument("archive")
def build(archive: str, output: str, **inputs: str | None) -> None:
    """Build an image into an archive.

    The image names its closure and holds none of it; equal inputs give equal bytes.
    """
    from nixlet.images import builder

    request = builder.read_request(store_dir=os.environ.get("NIX_STORE_DIR", "/nix/store"), **inputs)  # type: ignore[arg-type]  # options are named as its parameters
    built = builder.build_image(request, archive)
    if output == "json":
        options.print_json({"name": built.name, "digest": built.digest, "id": built.config_digest})
    else:
        click.echo(built.name)


async def _snapshotter_of(state_dir: str) -> str:
    from nixlet.cli import node

    async with node.connected(state_dir) as connection:
        return (await connection.status()).snapshotter


@image.command()
@options.state_dir
@click.option("--address", envvar="CONTAINERD_ADDRESS", help="Another containerd's socket.  [default: the node's]")
@click.option("--namespace", envvar="CONTAINERD_NAMESPACE", help="containerd's namespace.  [default: k8s.io]")
@click.option(
    "--snapshotter", envvar="CONTAINERD_SNAPSHOTTER", help="[default: the node's; nix for another containerd]"
)
@click.option("--ref", help="The name to load it under.  [default: the archive's own, or nix:0ARCHIVE]")
@click.argument("archive")
@options.asynchronous
async def load(
    archive: str, state_dir: str, address: str | None, namespace: str | None, snapshotter: str | None, ref: str | None
) -> None:
    """Load an image from an archive into a node's containerd; prints its name."""
    from nixlet.cli import progress
    from nixlet.containerd import client, imagestore
    from nixlet.images import archive as archives
    from nixlet.images import loader, platforms, reference
    from nixlet.node import config
    from nixlet.rpc import channel as channels
    from nixlet.store import policy, realiser, roots
    from nixlet.store.daemon import client as nix

    path = os.path.abspath(archive)
    socket = address or config.Layout("", state_dir).containerd_socket
    # What another containerd calls the snapshotter that shows store paths is its own affair; a node's is called nix.
    shows_store_paths = True
    if snapshotter is None:
        snapshotter = "nix" if address else await _snapshotter_of(state_dir)
        shows_store_paths = snapshotter == "nix"
    store = nix.DaemonStore(nix.DaemonSettings.from_environment(os.environ))
    bringer = realiser.Realiser(store, roots.Roots(store.settings.gcroots, "unused"), policy.Policy())
    async with channels.connect(socket.removeprefix("unix://")) as channel:
        containerd = imagestore.ImageStore(channel, socket, namespace or client.CRI_NAMESPACE)
        with archives.open_archive(path) as source, progress.shown(os.path.basename(path)) as sink:
            found = source.image(platforms.host_platform())
            own = found.names[0] if found.names else f"{reference.NIX_PREFIX}{path}"
            name = reference.canonical(reference.parse(ref or own, store.store_dir))
            await loader.Loader(containerd, snapshotter, bringer if shows_store_paths else None).load(
                source, found, [name], sink=sink
            )
    click.echo(name)
