"""Tables of plain text, as container tools print them."""

from collections.abc import Sequence

import click


def echo(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below a head, each column as wide as it needs."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
