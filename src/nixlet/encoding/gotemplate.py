"""Go's text/template, as far as templates of containerd's configuration go (pkg.go.dev/text/template): its syntax.

Understood are fields, variables, literals, pipelines and parentheses, ``if``, ``else``, ``with``, ``range``, comments, and
``template`` for templates that are given (``gotemplate_run`` executes them). All else is refused with its line, rather than
rendered wrongly.
"""

import dataclasses
import re
from collections.abc import Iterator

from nixlet import errors

#: An action: what stands between braces, with the marks that trim the white space around it.
_ACTION = re.compile(
    r"""\{\{ (?P<trim_left>-(?=\s))? \s* (?P<body> /\*.*?\*/ | (?: "(?:\\.|[^"\\])*" | `[^`]*` | [^"`] )*? ) \s*?
        (?P<trim_right>(?<=\s)-)? \}\}""",
    re.VERBOSE | re.DOTALL,
)

_TOKEN = re.compile(
    r"""\s*(?: (?P<string>"(?:\\.|[^"\\\n])*") | (?P<raw>`[^`]*`) | (?P<number>[+-]?[0-9]+)(?![.\w])
        | (?P<variable>\$\w*) | (?P<field>\.[A-Za-z_]\w*) | (?P<word>[A-Za-z_]\w*) | (?P<mark>:=|[.=,|()]) )""",
    re.VERBOSE | re.ASCII,
)

#: What Go's quoted strings have behind a backslash.
_ESCAPES = {
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
    "\\": "\\",
    '"': '"',
}
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)

_CONSTANTS = {"true": True, "false": False, "nil": None}
_KEYWORDS = frozenset({"if", "else", "end", "range", "with", "template", "define", "block", "break", "continue"})

#: Blocks and parentheses within each other.
_MAX_DEPTH = 50


class NotSupportedError(ValueError):
    """An action has something that is not understood."""


@dataclasses.dataclass(frozen=True, slots=True)
class Literal:
    """A value that stands in the template."""

    value: str | int | bool | None


@dataclasses.dataclass(frozen=True, slots=True)
class Word:
    """The name of a function."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """Fields of the dot, of a variable, or of what a pipeline in parentheses gives."""

    start: "str | Pipeline"
    fields: tuple[str, ...]


Operand = Literal | Word | Chain


@dataclasses.dataclass(frozen=True, slots=True)
class Pipeline:
    """Commands, each of which gets the outcome of the one before; and the variables that the last one's goes to.

    Attributes:
        commands: The operands of each.
        variables: Names with their dollar sign.
        declares: Whether they are new.
    """

    commands: tuple[tuple[Operand, ...], ...]
    variables: tuple[str, ...] = ()
    declares: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """What is printed as it stands."""

    text: str
    line: int


@dataclasses.dataclass(frozen=True, slots=True)
class Action:
    """A pipeline whose outcome is printed, unless it goes to a variable.

    Attributes:
        pipeline: The pipeline.
        line: Its line, from one on.
        shown: How it is written, for errors.
    """

    pipeline: Pipeline
    line: int
    shown: str


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """Another template in this place; the dot is its."""

    name: str
    line: int


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """``if``, ``with`` or ``range``, with what follows when there is something, and when there is nothing."""

    kind: str
    head: Action
    body: "tuple[Node, ...]"
    otherwise: "tuple[Node, ...]"


Node = Text | Action | Call | Block


def shown(body: str) -> str:
    """An action for a sentence: shortened where it is long."""
    written = " ".join(body.split())
    return f"{{{{ {written if len(written) < 60 else f'{written[:57]}...'} }}}}"


def parsed(text: str, path: str, hint: str = "") -> tuple[Node, ...]:
    """A template.

    Args:
        text: The template.
        path: What errors call it.
        hint: What may be written instead of what is not understood.

    Raises:
        UsageError: There is something that is not understood; the sentence names its line.
    """
    return _Parser(text, path, hint).template()


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of the text between actions, or the inside of an action."""

    text: str
    line: int
    is_action: bool


class _Parser:
    def __init__(self, text: str, path: str, hint: str) -> None:
        self._path = path
        self._hint = hint
        self._pieces = list(_pieces(text, path))
        self._at = 0

    def template(self) -> tuple[Node, ...]:
        nodes, end = self._nodes(0)
        if end is not None:
            raise self._error(end, f"{shown(end.text)} closes nothing")
        return nodes

    def _error(self, piece: _Piece, message: str, hint: str = "") -> errors.UsageError:
        return errors.UsageError(f"{self._path}, line {piece.line}: {message}", hint=hint)

    def _nodes(self, depth: int) -> tuple[tuple[Node, ...], _Piece | None]:
        """What follows, and the ``else`` or ``end`` that it goes up to, if there is one."""
        nodes: list[Node] = []
        while self._at < len(self._pieces):
            piece = self._pieces[self._at]
            self._at += 1
            if not piece.is_action:
                nodes.append(Text(piece.text, piece.line))
                continue
            word = re.match(r"\w*", piece.text)
            if word is not None and word[0] in {"else", "end"}:
                return tuple(nodes), piece
            if not piece.text.startswith("/*"):
                nodes.append(self._action(piece, depth))
        return tuple(nodes), None

    def _action(self, piece: _Piece, depth: int) -> Node:
        found = re.match(r"(if|with|range)\b(.*)", piece.text, re.DOTALL)
        if found is not None:
            return self._block(piece, found[1], found[2], depth)
        called = re.fullmatch(r'template\s+(?:"([^"\\]*)"|`([^`]*)`)\s+[.$]', piece.text)
        if called is not None:
            return Call(called[1] or called[2] or "", piece.line)
        return Action(self._pipeline(piece, piece.text), piece.line, shown(piece.text))

    def _block(self, piece: _Piece, kind: str, head: str, depth: int) -> Block:
        if depth >= _MAX_DEPTH:
            raise self._error(piece, "blocks are nested too deep")
        action = Action(
            self._pipeline(piece, head, variables=2 if kind == "range" else 1), piece.line, shown(piece.text)
        )
        body, end = self._nodes(depth + 1)
        otherwise: tuple[Node, ...] = ()
        if end is not None and (again := re.fullmatch(r"else\s+(if|with)\b(.*)", end.text, re.DOTALL)):
            if again[1] != kind:
                raise self._unsupported(end)
            # It shares the end with the block that it belongs to.
            return Block(kind, action, body, (self._block(end, kind, again[2], depth + 1),))
        if end is not None and end.text == "else":
            otherwise, end = self._nodes(depth + 1)
        if end is None:
            raise self._error(piece, f"{shown(piece.text)} is not closed by {{{{ end }}}}")
        if end.text != "end":
            raise self._unsupported(end)
        return Block(kind, action, body, otherwise)

    def _unsupported(self, piece: _Piece) -> errors.UsageError:
        return self._error(piece, f"{shown(piece.text)} is not supported in a template", self._hint)

    def _pipeline(self, piece: _Piece, text: str, variables: int = 1) -> Pipeline:
        try:
            return _Pipelines(text).whole(variables)
        except NotSupportedError as error:
            raise self._unsupported(piece) from error


class _Pipelines:
    """Reads the inside of an action."""

    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self._at = 0

    def whole(self, variables: int) -> Pipeline:
        names, declares = self._variables(variables)
        pipeline = self._commands(0)
        if self._at < len(self._tokens):
            raise NotSupportedError
        return dataclasses.replace(pipeline, variables=names, declares=declares)

    def _peek(self, ahead: int = 0) -> tuple[str, str, bool]:
        """Kind and text of a token, and whether it follows the one before without white space."""
        at = self._at + ahead
        return self._tokens[at] if at < len(self._tokens) else ("end", "", False)

    def _variables(self, most: int) -> tuple[tuple[str, ...], bool]:
        names: list[str] = []
        ahead = 0
        while len(names) < most and self._peek(ahead)[0] == "variable":
            names.append(self._peek(ahead)[1])
            mark = self._peek(ahead + 1)[1]
            ahead += 2
            if mark in {":=", "="}:
                self._at += ahead
                return tuple(names), mark == ":="
            if mark != ",":
                break
        return (), False

    def _commands(self, depth: int) -> Pipeline:
        if depth > _MAX_DEPTH:
            raise NotSupportedError
        commands = [self._command(depth)]
        while self._peek()[1] == "|" and self._peek()[0] == "mark":
            self._at += 1
            commands.append(self._command(depth))
        return Pipeline(tuple(commands))

    def _command(self, depth: int) -> tuple[Operand, ...]:
        operands: list[Operand] = []
        while (operand := self._operand(depth)) is not None:
            operands.append(operand)
        if not operands:
            raise NotSupportedError
        return tuple(operands)

    def _operand(self, depth: int) -> Operand | None:
        kind, text, _ = self._peek()
        if kind == "end" or (kind == "mark" and text in {"|", ")"}):
            return None
        self._at += 1
        match kind:
            case "string":
                return Literal(_unquoted(text))
            case "raw":
                return Literal(text[1:-1])
            case "number":
                return Literal(int(text))
            case "word" if text in _CONSTANTS:
                return Literal(_CONSTANTS[text])
            case "word" if text not in _KEYWORDS:
                return Word(text)
            case "variable":
                return Chain(text, self._fields())
            case "field":
                return Chain(".", (text[1:], *self._fields()))
            case "mark" if text == ".":
                return Chain(".", ())
            case "mark" if text == "(":
                inner = self._commands(depth + 1)
                if self._peek()[1] != ")":
                    raise NotSupportedError
                self._at += 1
                return Chain(inner, self._fields())
            case _:
                raise NotSupportedError

    def _fields(self) -> tuple[str, ...]:
        """The fields that follow without white space."""
        fields = []
        while self._peek()[0] == "field" and self._peek()[2]:
            fields.append(self._peek()[1][1:])
            self._at += 1
        return tuple(fields)


def _tokens(text: str) -> Iterator[tuple[str, str, bool]]:
    place, text = 0, text.rstrip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None or found.lastgroup is None:
            raise NotSupportedError
        yield found.lastgroup, found[found.lastgroup], found.start(found.lastgroup) == place and place > 0
        place = found.end()


def _unquoted(quoted: str) -> str:
    def character(found: re.Match[str]) -> str:
        number = found[1] or found[2] or found[3]
        if number is not None:
            return chr(int(number, 16)) if int(number, 16) < 0x110000 else "\ufffd"
        if found[4] not in _ESCAPES:
            raise NotSupportedError
        return _ESCAPES[found[4]]

    return _ESCAPE.sub(character, quoted[1:-1])


def _pieces(text: str, path: str) -> Iterator[_Piece]:
    place, trim = 0, False
    for action in _ACTION.finditer(text):
        yield _plain(text, path, place, action.start(), trim_left=trim, trim_right=bool(action["trim_left"]))
        yield _Piece(action["body"].strip(), text.count("\n", 0, action.start()) + 1, is_action=True)
        place, trim = action.end(), bool(action["trim_right"])
    yield _plain(text, path, place, len(text), trim_left=trim, trim_right=False)


def _plain(text: str, path: str, start: int, end: int, *, trim_left: bool, trim_right: bool) -> _Piece:
    piece = text[start:end]
    line = text.count("\n", 0, start) + 1
    if "{{" in piece:
        line += piece.count("\n", 0, piece.index("{{"))
        raise errors.UsageError(f"{path}, line {line}: {{{{ is not closed by }}}}")
    if trim_left:
        trimmed = piece.lstrip()
        line += piece[: len(piece) - len(trimmed)].count("\n")
        piece = trimmed
    return _Piece(piece.rstrip() if trim_right else piece, line, is_action=False)
