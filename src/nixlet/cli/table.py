"""Tables of plain text, as container tools print them."""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def echo(head: "Sequence[str]", rows: "Sequence[Sequence[str]]") -> None:
    """Print rows below a head, each column as wide as it needs."""
    lines = [head, *rows]
    widths = [max(len(row[column]) for row in lines) for column in range(len(head))]
    sys.stdout.write(
        "".join(
            f"{'  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()}\n"
            for row in lines
        )
    )
