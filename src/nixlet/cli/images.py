"""``nixlet images``: list images."""

from nixlet.cli import grammar, options


@grammar.verb(
    options.STATE_DIR,
    options.OUTPUT,
)
def images(state_dir: str, output: str) -> None:
    """List the images that the node has."""
    from nixlet.cli import link, sizes, table

    with link.connected(state_dir) as node:
        found = sorted(node.call("ListImages")["images"], key=lambda image: (image["tags"], image["id"]))
    if output == "json":
        listed = [
            {
                "id": image["id"],
                "names": image["tags"] + image["digests"],
                "size": image["size"],
                "pinned": image["pinned"],
            }
            for image in found
        ]
        options.print_json(listed)
        return
    rows = [
        (name, image["id"].removeprefix("sha256:")[:12], sizes.decimal(image["size"]))
        for image in found
        for name in (image["tags"] or image["digests"] or ["<none>"])
    ]
    table.echo(("NAME", "IMAGE ID", "SIZE"), rows)
