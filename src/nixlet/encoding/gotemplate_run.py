"""Go's text/template, executed: values have types, as there, and what has none of the right type is an error with its line."""

import dataclasses
import functools
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nixlet import errors
from nixlet.encoding import gotemplate
from nixlet.encoding import gotemplate_values as values

#: Characters that a template may make; more is no configuration.
MAX_OUTPUT = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A piece of what a template makes.

    Attributes:
        text: The piece; empty for another template.
        line: The line in the template where it comes from.
        calls: The name of another template that stands here.
    """

    text: str
    line: int
    calls: str = ""


def executed(text: str, path: str, data: values.Struct, hint: str = "") -> Iterator[Piece]:
    """What a template makes, piece by piece.

    Args:
        text: The template.
        path: What errors call it.
        data: The dot.
        hint: What may be written instead of what is not understood.

    Raises:
        UsageError: Something is not understood, or does not fit its value; the sentence names the line.
    """
    nodes = gotemplate.parsed(text, path, hint)
    run = _Run(path, hint)
    made = 0
    for piece in run.nodes(nodes, data, ChainMap({"$": data})):
        made += len(piece.text)
        if made > MAX_OUTPUT:
            raise errors.UsageError(f"{path}, line {piece.line}: the template makes more than {MAX_OUTPUT} characters")
        yield piece


Scope = ChainMap[str, Any]


class _Run:
    def __init__(self, path: str, hint: str) -> None:
        self._path = path
        self._hint = hint

    def nodes(self, nodes: Sequence[gotemplate.Node], dot: object, scope: Scope) -> Iterator[Piece]:
        for node in nodes:
            match node:
                case gotemplate.Text():
                    yield Piece(node.text, node.line)
                case gotemplate.Call():
                    yield Piece("", node.line, calls=node.name)
                case gotemplate.Action():
                    value = self._value(node, dot, scope)
                    if not node.pipeline.variables:
                        yield Piece(self._told(node, functools.partial(values.printed, value)), node.line)
                case gotemplate.Block():
                    yield from self._block(node, dot, scope)

    def _block(self, block: gotemplate.Block, dot: object, scope: Scope) -> Iterator[Piece]:
        inner = scope.new_child()
        if block.kind != "range":
            value = self._value(block.head, dot, inner)
            within = value if block.kind == "with" and values.is_true(value) else dot
            yield from self.nodes(block.body if values.is_true(value) else block.otherwise, within, inner)
            return
        value = self._value(
            dataclasses.replace(block.head, pipeline=_without_variables(block.head.pipeline)), dot, inner
        )
        items = self._told(block.head, lambda: list(values.items(value)))
        names = block.head.pipeline.variables
        for key, item in items:
            each = inner.new_child()
            each.update(zip(names, (key, item) if len(names) == 2 else (item,), strict=False))
            yield from self.nodes(block.body, item, each)
        if not items:
            yield from self.nodes(block.otherwise, dot, inner)

    def _told(self, action: gotemplate.Action, make: Callable[[], Any]) -> Any:  # noqa: ANN401 (any value)
        """An outcome, with the line of an action in the error when there is none."""
        try:
            return make()
        except gotemplate.NotSupportedError as error:
            raise errors.UsageError(
                f"{self._path}, line {action.line}: {action.shown} is not supported in a template", hint=self._hint
            ) from error
        except values.MistakeError as error:
            raise errors.UsageError(
                f"{self._path}, line {action.line}: {action.shown}: {error}", hint=error.hint
            ) from error

    def _value(self, action: gotemplate.Action, dot: object, scope: Scope) -> Any:  # noqa: ANN401 (any value)
        pipeline = action.pipeline
        value = self._told(action, lambda: _piped(pipeline, dot, scope))
        for name in pipeline.variables:
            if pipeline.declares:
                scope[name] = value
                continue
            holder = next((each for each in scope.maps if name in each), None)
            if holder is None:
                self._told(action, functools.partial(_missing_variable, name))
            else:
                holder[name] = value
        return value


def _missing_variable(name: str) -> None:
    raise values.MistakeError(f"there is no variable {name}")


def _without_variables(pipeline: gotemplate.Pipeline) -> gotemplate.Pipeline:
    return dataclasses.replace(pipeline, variables=())


def _piped(pipeline: gotemplate.Pipeline, dot: object, scope: Scope) -> Any:  # noqa: ANN401 (any value)
    handed: tuple[Any, ...] = ()
    for command in pipeline.commands:
        handed = (_command(command, handed, dot, scope),)
    return handed[0]


def _command(command: tuple[gotemplate.Operand, ...], handed: tuple[Any, ...], dot: object, scope: Scope) -> Any:  # noqa: ANN401 (any value)
    first, *others = command
    if isinstance(first, gotemplate.Word):
        arguments: list[Callable[[], Any]] = [functools.partial(_operand, each, dot, scope) for each in others]
        # What the command before gave is the last argument.
        arguments += [functools.partial(_itself, value) for value in handed]
        if first.name in {"and", "or"}:
            return _first(arguments, wanted=first.name == "or")
        function = values.FUNCTIONS.get(first.name)
        if function is None:
            raise gotemplate.NotSupportedError
        return function(*(argument() for argument in arguments))
    if others or handed:
        raise values.MistakeError("this is no function, and takes no arguments")
    return _operand(first, dot, scope)


def _first(arguments: Sequence[Callable[[], Any]], *, wanted: bool) -> Any:  # noqa: ANN401 (any value)
    """The first value that is true (or false), else the last; what follows it is not looked at."""
    if not arguments:
        raise values.MistakeError("a value is missing")
    value = None
    for argument in arguments:
        value = argument()
        if values.is_true(value) == wanted:
            break
    return value


def _operand(operand: gotemplate.Operand, dot: object, scope: Scope) -> Any:  # noqa: ANN401 (any value)
    if isinstance(operand, gotemplate.Literal):
        return operand.value
    if isinstance(operand, gotemplate.Word):
        return _command((operand,), (), dot, scope)
    value: Any
    if isinstance(operand.start, gotemplate.Pipeline):
        value = _piped(operand.start, dot, scope)
    elif operand.start == ".":
        value = dot
    elif operand.start in scope:
        value = scope[operand.start]
    else:
        raise values.MistakeError(f"there is no variable {operand.start}")
    for number, field in enumerate(operand.fields):
        value = values.field(value, field, operand.fields[:number])
    return value


def _itself(value: object) -> object:
    return value
