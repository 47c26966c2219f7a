"""``nixlet image``: build and load images."""

import os
import sys

from nixlet import errors
from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from nixlet.images import archive as archives

_STANDARD_INPUT = "-"


@grammar.verb(
    grammar.Value(
        "--config", required=True, text='The "config" object of an OCI image configuration: JSON, or a file of it.'
    ),
    grammar.Value("--closure", required=True, text="A file of store paths, one a line."),
    grammar.Value("--closure-info", text="The store path that lists the closure, for nodes to realise."),
    grammar.Value("--copy-to-root", text="A list of store paths whose files appear below /: JSON, or a file of it."),
    grammar.Value("--from-image", text="The archive of an image to build upon."),
    grammar.Value("--ref", default_text="nix:0OUTPUT", text="The image's name."),
    grammar.Value("--architecture", default_text="this machine's", text="What it runs on, in Go's words."),
    options.OUTPUT,
    grammar.Argument("archive"),
)
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
        print(built.name)


async def _snapshotter_of(state_dir: str) -> str:
    from nixlet.cli import node

    async with node.connected(state_dir) as connection:
        return (await connection.status()).snapshotter


@grammar.verb(
    options.STATE_DIR,
    grammar.Value(
        "--address", variable="CONTAINERD_ADDRESS", default_text="the node's", text="Another containerd's socket."
    ),
    grammar.Value(
        "--namespace", variable="CONTAINERD_NAMESPACE", default_text="k8s.io", text="containerd's namespace."
    ),
    grammar.Value(
        "--snapshotter", variable="CONTAINERD_SNAPSHOTTER", default_text="the node's; nix for another containerd"
    ),
    grammar.Value("--ref", default_text="the archive's own, or nix:0ARCHIVE", text="The name to load it under."),
    grammar.Argument("archive", default=_STANDARD_INPUT),
)
def load(
    archive: str, state_dir: str, address: str | None, namespace: str | None, snapshotter: str | None, ref: str | None
) -> None:
    """Load the images of an archive into a node's containerd; prints their names.

    ARCHIVE is a file or a pipe; - or nothing stands for standard input.
    """
    import asyncio
    import contextlib

    from nixlet.images import archive as archives

    with contextlib.ExitStack() as stack:
        # Before there is an event loop: a pipe may have to be waited for, and Ctrl-C has to end that.
        if archive == _STANDARD_INPUT:
            paths, label = list[str](), "standard input"
            if sys.stdin is None or sys.stdin.isatty():
                raise errors.UsageError("there is no archive", hint="name an ARCHIVE, or pipe one to standard input")
            source = stack.enter_context(archives.open_archive(sys.stdin.fileno(), label=label, piped=True))
        else:
            path, label = os.path.abspath(archive), os.path.basename(archive)
            source = stack.enter_context(archives.open_archive(path, piped=True))
            paths = [path, os.path.realpath(path)] if os.path.isfile(path) else []
        recorded: list[str] = []
        try:
            asyncio.run(_load(source, paths, label, state_dir, address, namespace, snapshotter, ref, recorded))
        finally:
            # What was recorded stays, also when the next image can't be loaded.
            for name in recorded:
                print(name)


async def _load(
    source: "archives.Archive",
    paths: "Sequence[str]",
    label: str,
    state_dir: str,
    address: str | None,
    namespace: str | None,
    snapshotter: str | None,
    ref: str | None,
    recorded: list[str],
) -> None:
    """Load the images; their names go to ``recorded`` as soon as they are."""
    from nixlet.cli import progress
    from nixlet.containerd import client, cri, imagestore
    from nixlet.images import archive as archives
    from nixlet.images import loader, platforms, pulls, reference
    from nixlet.node import config
    from nixlet.rpc import channel as channels
    from nixlet.store import policy, realiser
    from nixlet.store.daemon import client as nix

    store = nix.DaemonStore(nix.DaemonSettings.from_environment(os.environ))
    found = source.images(platforms.host_platform())
    if ref is None:
        names = archives.recorded_names(found, paths)
    else:
        if len(found) > 1:
            raise errors.InvalidArgumentError(
                f"--ref names one image, and {label} holds {len(found)}", hint="load them without it"
            )
        names = [(reference.canonical(reference.parse(ref, store.store_dir)),)]
    socket = address or config.Layout("", state_dir).containerd_socket
    if snapshotter is None:
        snapshotter = "nix" if address else await _snapshotter_of(state_dir)
    # What another containerd calls the snapshotter that shows store paths is its own affair; a node's is called nix.
    shows_store_paths = address is not None or snapshotter == "nix"
    bringer = realiser.Realiser(store, policy.Policy())
    async with channels.connect(socket.removeprefix("unix://")) as channel:
        containerd = imagestore.ImageStore(channel, socket, namespace or client.CRI_NAMESPACE)
        loading = loader.Loader(containerd, snapshotter, bringer if shows_store_paths else None)
        with progress.shown(label) as sink:
            for each, own in zip(found, names, strict=True):
                loaded = await loading.load(source, each, own, sink=sink)
                recorded += own
                if address is None and containerd.namespace == client.CRI_NAMESPACE:
                    # A container that is run next is to find it.
                    await pulls.wait_for_cri(cri.ImageClient(channel, socket), loaded.image_id, own)


image = grammar.Group("Build and load images.", {"build": build, "load": load})
