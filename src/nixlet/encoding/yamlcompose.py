r"""YAML as trees of nodes that know their places: read by libyaml, put together as Kubernetes' reader (go-yaml 2) does it.

Other than PyYAML's own composer, this one lets an anchor be defined again, resolves plain scalars as ``yamlscalars`` has it, and
takes ``\'`` in double quotes.
"""

import codecs
import collections
import io
import itertools
import re
from collections.abc import Iterator
from typing import Any

import yaml

from nixlet import errors
from nixlet.encoding import yamlscalars

#: Aliases may not multiply a document beyond this many values.
MAX_NODES = 50_000

_ESCAPE = "found unknown escape character"

#: ``\'`` whose backslash is not itself escaped.
_QUOTE = re.compile(r"(?<!\\)(?:\\\\)*\\'")


def documents(text: bytes, source: str) -> Iterator[yaml.Node]:
    """The documents of a stream; empty ones are left out.

    Raises:
        UsageError: It is no YAML, or too large.
    """
    for node in _nodes(text, source):
        if not (isinstance(node, yaml.ScalarNode) and node.tag == yamlscalars.NULL):
            _check_size(node, source)
            yield node


def _refused(error: yaml.YAMLError, text: bytes, source: str) -> errors.UsageError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if mark is None:
        return errors.UsageError(f"{source}: this is no YAML: {problem}")
    lines = text.split(b"\n")
    line = lines[mark.line] if mark.line < len(lines) else b""
    begin = line[: len(line) - len(line.lstrip())]
    hint = ""
    if b"\t" in begin or line[mark.column : mark.column + 1] == b"\t":
        problem, hint = "there is a tab, and YAML is indented by spaces alone", "replace it by spaces"
    return errors.UsageError(
        f"{source}, line {mark.line + 1}, column {mark.column + 1}: this is no YAML: {problem}", hint=hint
    )


def _nodes(text: bytes, source: str) -> list[yaml.Node]:
    try:
        return list(_composed(_events(text), source))
    except yaml.YAMLError as error:
        if getattr(error, "problem", "") != _ESCAPE:
            raise _refused(error, text, source) from error
    try:
        text = _with_other_quotes(text)
        return list(_composed(_events(text), source))
    except yaml.YAMLError as error:
        raise _refused(error, text, source) from error


def _events(text: bytes) -> Iterator[yaml.Event]:
    return yaml.parse(io.BytesIO(text), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _with_other_quotes(text: bytes) -> bytes:
    r"""A text with the one escape that go-yaml has and libyaml hasn't written in another way, in double quotes alone.

    Elsewhere the same characters mean something else. Which are where is libyaml's to say: it reads the text with one more
    backslash before each, which changes nothing of what begins and ends where.
    """
    whole = text.decode("utf-16" if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    places = [found.end() - 2 for found in _QUOTE.finditer(whole)]
    pieces = [whole[begin:end] for begin, end in itertools.pairwise((0, *places, len(whole)))]
    left = collections.deque(enumerate(places))
    quoted = set()
    for event in _events("\\".join(pieces).encode()):
        if isinstance(event, yaml.ScalarEvent) and event.style == '"' and left:
            begin, end = event.start_mark, event.end_mark
            assert begin is not None
            assert end is not None
            while left and sum(left[0]) < begin.index:
                left.popleft()
            while left and sum(left[0]) < end.index:
                quoted.add(left.popleft()[1])
    written = [
        f"\\x27{piece[2:]}" if place in quoted else piece for place, piece in zip(places, pieces[1:], strict=True)
    ]
    return "".join((pieces[0], *written)).encode()


def _composed(events: Iterator[yaml.Event], source: str) -> Iterator[yaml.Node]:
    """The root node of each document."""
    document = _Document(source)
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            document = _Document(source)
        elif isinstance(event, yaml.DocumentEndEvent):
            yield document.root
        elif isinstance(event, (yaml.NodeEvent, yaml.CollectionEndEvent)):
            document.take(event)


class _Document:
    """A document that is being put together; without recursion, so that what is nested deep is no matter of Python's stack.

    Attributes:
        root: Its root node, once there is one.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._anchors: dict[str, yaml.Node] = {}
        self._open: list[yaml.Node] = []
        self._count = 0
        self.root: yaml.Node = yaml.ScalarNode(yamlscalars.NULL, "")

    def take(self, event: "yaml.NodeEvent | yaml.CollectionEndEvent") -> None:
        """Take the next event up."""
        if isinstance(event, yaml.CollectionEndEvent):
            closed = self._open.pop()
            if isinstance(closed, yaml.MappingNode):
                # Keys and values came one after the other.
                closed.value = list(zip(closed.value[::2], closed.value[1::2], strict=True))
            return
        self._count += 1
        if self._count > MAX_NODES:
            raise _too_many(self._source)
        node = self._aliased(event) if isinstance(event, yaml.AliasEvent) else _made(event)
        if event.anchor and not isinstance(event, yaml.AliasEvent):
            self._anchors[event.anchor] = node
        if self._open:
            self._open[-1].value.append(node)
        else:
            self.root = node
        if isinstance(event, yaml.CollectionStartEvent):
            self._open.append(node)

    def _aliased(self, event: yaml.AliasEvent) -> yaml.Node:
        name = event.anchor or ""
        node = self._anchors.get(name)
        if node is not None and not any(node is each for each in self._open):
            return node
        mark = event.start_mark
        assert mark is not None
        problem = "stands for nothing" if node is None else "stands in what it stands for"
        raise errors.UsageError(
            f"{self._source}, line {mark.line + 1}, column {mark.column + 1}: this is no YAML: the alias *{name[:40]} {problem}"
        )


def _made(event: yaml.NodeEvent) -> yaml.Node:
    # libyaml's marks have what nodes need of PyYAML's.
    place: Any = event.start_mark
    if isinstance(event, yaml.ScalarEvent):
        return yaml.ScalarNode(_tag(event), event.value, place)
    return (yaml.SequenceNode if isinstance(event, yaml.SequenceStartEvent) else yaml.MappingNode)("", [], place)


def _tag(event: yaml.ScalarEvent) -> str:
    if event.tag is not None and event.tag != "!":
        return yamlscalars.explicit(event.tag)
    return yamlscalars.tag(event.value) if event.tag is None and event.implicit[0] else yamlscalars.STR


def _too_many(source: str) -> errors.UsageError:
    return errors.UsageError(f"{source} has more than {MAX_NODES} values")


def _check_size(node: yaml.Node, source: str) -> None:
    """Count values as often as aliases repeat them, which is how small texts become huge."""
    seen = 1
    pending: list[yaml.Node] = [node]
    while pending:
        current = pending.pop()
        inner: list[yaml.Node] = []
        if isinstance(current, yaml.MappingNode):
            inner = [part for pair in current.value for part in pair]
        elif isinstance(current, yaml.SequenceNode):
            inner = current.value
        # Counted before they are queued: a long list of aliases of one list would fill the memory otherwise.
        seen += len(inner)
        if seen > MAX_NODES:
            raise _too_many(source)
        pending.extend(inner)
