"""``nixlet image``: build and load images."""

import os
import sys

from nixlet import errors
from nixlet.cli import grammar, options
from nixlet.containerd import namespaces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

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


@grammar.verb(
    options.STATE_DIR,
    grammar.Value(
        "--address", variable="CONTAINERD_ADDRESS", default_text="the node's", text="Another containerd's socket."
    ),
    grammar.Value(
        "--namespace", variable="CONTAINERD_NAMESPACE", default_text=namespaces.CRI, text="containerd's namespace."
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
    fd, label, paths = _opened(archive)
    names: list[str] = []
    try:
        # Another containerd is none of the node's business, and neither is another namespace.
        if address is None and namespace in {None, namespaces.CRI}:
            _let_load(fd, label, paths, state_dir, snapshotter, ref, names)
        else:
            from nixlet.cli import loading

            loading.load(fd, label, paths, state_dir, address, namespace, snapshotter, ref, names)
    finally:
        os.close(fd)
        # What was recorded stays, also when the next image can't be loaded.
        for name in names:
            print(name)


def _opened(archive: str) -> "tuple[int, str, Sequence[str]]":
    """An archive: its descriptor, which is the caller's, what errors call it, and the paths that it goes by."""
    if archive == _STANDARD_INPUT:
        if sys.stdin is None or sys.stdin.isatty():
            raise errors.UsageError("there is no archive", hint="name an ARCHIVE, or pipe one to standard input")
        return os.dup(sys.stdin.fileno()), "standard input", []
    from nixlet.images import archivepath

    path = os.path.abspath(archive)
    fd = archivepath.opened(path, piped=True)
    return fd, path, [path, os.path.realpath(path)] if os.path.isfile(path) else []


def _let_load(
    fd: int,
    label: str,
    paths: "Sequence[str]",
    state_dir: str,
    snapshotter: str | None,
    ref: str | None,
    names: list[str],
) -> None:
    """Let the node load the images; their names go to ``names`` as soon as they are."""
    from nixlet.cli import link, progress

    with link.connected(state_dir) as node, progress.Shown(os.path.basename(label)) as shown:
        asked = {"archive": 0, "label": label, "paths": paths, "ref": ref, "snapshotter": snapshotter}
        for reply in node.stream("LoadImage", asked, [fd]):
            if step := reply.get("progress"):
                shown.tell(step)
            elif name := reply.get("loaded"):
                names.append(name)


image = grammar.Group("Build and load images.", {"build": build, "load": load})
