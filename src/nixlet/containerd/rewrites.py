"""Changes of repository names, with Go's regular expressions: their syntax is RE2's (github.com/google/re2/wiki/Syntax)."""

import dataclasses
import re
from types import MappingProxyType

#: What goes between the brackets of a class, for those that have names.
_CLASSES = MappingProxyType(
    {
        "alnum": "0-9A-Za-z",
        "alpha": "A-Za-z",
        "ascii": r"\x00-\x7f",
        "blank": r"\t ",
        "cntrl": r"\x00-\x1f\x7f",
        "digit": "0-9",
        "graph": "!-~",
        "lower": "a-z",
        "print": " -~",
        "punct": r"!-/:-@\[-`{-~",
        "space": r"\t-\r ",
        "upper": "A-Z",
        "word": "0-9A-Za-z_",
        "xdigit": "0-9A-Fa-f",
    }
)

#: The pieces of a pattern that Go and Python write differently, or that only one of them has.
_PIECE = re.compile(
    r"(?P<named>\[:(?P<class>\^?[a-z]+):\])"
    r"|(?P<group>\(\?<(?=[A-Za-z_]))"
    r"|(?P<end>\\z)"
    r"|(?P<missing>\\[1-9]|\\[pPCQEZ]|\(\?(?:[=!>(#]|<[=!]|P[=>])|[*+?}]\+)"
    r"|\\.|.",
    re.DOTALL,
)


def compiled(pattern: str) -> re.Pattern[str]:
    r"""A pattern of Go's.

    Raises:
        ValueError: It is none, or has something for which there is nothing here: classes of Unicode, ``\Q`` and ``\C``.
    """

    def translated(found: re.Match[str]) -> str:
        if found["missing"]:
            raise ValueError(f"{found['missing']} is not supported")
        if found["named"]:
            if found["class"] not in _CLASSES:
                raise ValueError(f"there is no class {found['named']}")
            return _CLASSES[found["class"]]
        return "(?P<" if found["group"] else r"\Z" if found["end"] else found[0]

    text = _PIECE.sub(translated, pattern)
    try:
        return re.compile(text, re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error


@dataclasses.dataclass(frozen=True, slots=True)
class Rewrite:
    """A change of repository names.

    Attributes:
        pattern: What is looked for.
        replacement: What takes its place, with Go's ``$1`` and ``${name}`` (regexp.Expand).
    """

    pattern: re.Pattern[str]
    replacement: str

    def apply(self, repository: str) -> str:
        """A repository's name with every match replaced."""
        pieces: list[str] = []
        done, last = 0, -1
        for match in self.pattern.finditer(repository):
            # As Go has it: an empty match right behind another match is none.
            if match.end() != last:
                pieces += (repository[done : match.start()], _expanded(self.replacement, match))
                done = last = match.end()
        return "".join((*pieces, repository[done:]))


#: Go's references to groups: the longest run of letters, digits and underscores, or what stands in braces.
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<braced>\w+)\}|(?P<bare>\w+))", re.ASCII)


def _expanded(template: str, match: re.Match[str]) -> str:
    """A replacement with the groups of a match in it; one that is not there is empty."""

    def value(found: re.Match[str]) -> str:
        if found["dollar"]:
            return "$"
        name: str = found["braced"] or found["bare"]
        try:
            return match[int(name) if name.isdigit() else name] or ""
        except IndexError:
            return ""

    return _VARIABLE.sub(value, template)
