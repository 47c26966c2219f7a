"""Colours, for terminals only."""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

#: ECMA-48, SGR.
BOLD, RED, GREEN, YELLOW, MAGENTA = "1", "31", "32", "33", "35"


def coloured(text: str, *parameters: str, stream: "TextIO") -> str:
    """A text as it is written to a stream: with colours where a person sees them.

    Args:
        text: The text.
        parameters: From above.
        stream: Where it goes.
    """
    if not stream.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{';'.join(parameters)}m{text}\x1b[0m"
