"""``nixlet images``: list images."""

from nixlet.cli import grammar, options


@grammar.verb(
    options.STATE_DIR,
    options.OUTPUT,
)
@options.asynchronous
async def images(state_dir: str, output: str) -> None:
    """List the images that the node has."""
    from nixlet.cli import node, progress, table

    async with node.connected(state_dir) as connection:
        found = sorted(await connection.images.images(), key=lambda image: (list(image.repo_tags), image.id))
    listed = [
        {
            "id": image.id,
            "names": list(image.repo_tags) + list(image.repo_digests),
            "size": image.size,
            "pinned": image.pinned,
        }
        for image in found
    ]
    if output == "json":
        options.print_json(listed)
        return
    rows = [
        (name, image.id.removeprefix("sha256:")[:12], progress.human_size(image.size))
        for image in found
        for name in (list(image.repo_tags) or list(image.repo_digests) or ["<none>"])
    ]
    table.echo(("NAME", "IMAGE ID", "SIZE"), rows)
