"""Changes of repository names, with Go's regular expressions: their syntax is RE2's (github.com/google/re2/wiki/Syntax)."""

import dataclasses
import re
import sys
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
    r"""(?P<set>\[\^?\]?(?:\[:\^?[a-z]+:\]|\\.|[^\]\\])*\])
    | (?P<flags>\(\?(?P<on>[imsU]*)(?:-(?P<off>[imsU]+))?(?P<how>[:)]))
    | (?P<named>\(\?P?<(?=[A-Za-z_]))
    | (?P<missing>\\[1-9pPCQEZ]|\(\?)
    | (?P<code>\\x\{[0-9A-Fa-f]+\})
    | (?P<end>\\z)
    | (?P<repeat>[*+?]|\{[0-9]+(?:,[0-9]*)?\})(?P<lazy>\??)
    | (?P<open>\() | (?P<close>\)) | (?P<or>\|) | (?P<brace>\{)
    | \\. | .""",
    re.DOTALL | re.VERBOSE,
)

#: The pieces of what stands in brackets.
_IN_SET = re.compile(r"\[:(?P<class>\^?[a-z]+):\]|(?P<code>\\x\{[0-9A-Fa-f]+\})|(?P<missing>\\[pPQE])|\\.|.", re.DOTALL)


def compiled(pattern: str) -> re.Pattern[str]:
    r"""A pattern of Go's.

    Raises:
        ValueError: It is none, or has something for which there is nothing here: classes of Unicode, ``\Q`` and ``\C``.
    """
    text = _Translation().whole(pattern)
    try:
        return re.compile(text, re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error


class _Translation:
    """Writes a pattern in Python's way.

    In Go flags hold from where they stand to the end of the group, in all alternatives that follow. Python has flags for groups
    alone: each alternative gets one. Python has no flag ``U``, by which repeats are as short as they can be.
    """

    def __init__(self) -> None:
        #: For each open group: the flags that came within it, and whether repeats are short.
        self._groups: list[tuple[list[str], bool]] = [([], False)]

    def whole(self, pattern: str) -> str:
        made, repeats = [], False
        for found in _PIECE.finditer(pattern):
            if found["repeat"] and repeats:
                raise ValueError(f"{found[0]} repeats a repeat")
            repeats = bool(found["repeat"])
            made.append(self._piece(found))
        return "".join((*made, ")" * len(self._groups[0][0])))

    def _piece(self, found: re.Match[str]) -> str:
        flags, short = self._groups[-1]
        match found.lastgroup:
            case "missing":
                raise ValueError(f"{found[0]} is not supported")
            case "set":
                begin = re.match(r"\[\^?\]?", found[0])
                assert begin is not None
                return begin[0] + _IN_SET.sub(_in_set, found[0][begin.end() : -1]) + "]"
            case "code":
                return _character(found[0])
            case "end":
                return r"\Z"
            case "repeat" | "lazy":
                return found["repeat"] + ("?" if short != bool(found["lazy"]) else "")
            case "brace":
                return r"\{"
            case "open" | "named":
                self._groups.append(([], short))
                return "(?P<" if found["named"] else "("
            case "close" if len(self._groups) > 1:
                self._groups.pop()
                return ")" * (len(flags) + 1)
            case "or":
                return ")" * len(flags) + "|" + "".join(flags)
            case "flags":
                return self._flags(found)
            case _:
                return found[0]

    def _flags(self, found: re.Match[str]) -> str:
        flags, short = self._groups[-1]
        on, off = found["on"], found["off"] or ""
        short = (short or "U" in on) and "U" not in off
        on, off = on.replace("U", ""), off.replace("U", "")
        group = f"(?{on}{off and '-'}{off}:"
        if found["how"] == ":":
            self._groups.append(([], short))
            return group
        if found[0] == "(?)":
            raise ValueError("(?) is not supported")
        self._groups[-1] = ([*flags, group], short)
        return group


def _in_set(found: re.Match[str]) -> str:
    if found["missing"]:
        raise ValueError(f"{found['missing']} is not supported")
    if found["class"]:
        if found["class"] not in _CLASSES:
            raise ValueError(f"there is no class {found[0]}")
        return _CLASSES[found["class"]]
    if found["code"]:
        return _character(found["code"])
    # Python keeps these for sets within sets.
    return f"\\{found[0]}" if found[0] in "[&~|" else found[0]


def _character(code: str) -> str:
    number = int(code[3:-1], 16)
    if number > sys.maxunicode:
        raise ValueError(f"there is no character {code}")
    return re.escape(chr(number))


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
