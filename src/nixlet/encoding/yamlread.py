"""YAML with places: every value knows where it stands, so that an error can say the line.

A mapping is read by taking its keys one after the other; what is left at the end is what nixlet does not support.
"""

import difflib
from collections.abc import Iterator
from typing import Literal

import yaml

from nixlet import errors
from nixlet.encoding import yamlcompose, yamlscalars

#: A text may be this large (bytes).
MAX_BYTES = 1 << 20

#: Mappings merged within each other.
_MAX_MERGES = 50

#: How much a key that is meant has in common with what is written.
_ALIKE = 0.75

_SHOWN = 80

#: Tags of what may be text: ``<<`` is a merge where it is a key alone.
_TEXT, _NUMBER = (":str", ":merge"), (":int", ":float")
_SCALARS = (*_TEXT, *_NUMBER, ":bool", ":null")


def documents(text: bytes, source: str) -> Iterator["Mapping"]:
    """The documents of a YAML stream, each of which must be a mapping.

    Args:
        text: The stream.
        source: What errors call it: a file's name, or "standard input".

    Raises:
        UsageError: It is no YAML, too large, or a document is something else.
    """
    if len(text) > MAX_BYTES:
        raise errors.UsageError(f"{source} is larger than {MAX_BYTES} bytes")
    for node in yamlcompose.documents(text, source):
        yield Mapping(node, "", source)


def shown(text: str) -> str:
    """Foreign text for a sentence: as it stands where it is short and printable, else quoted and shortened."""
    return text if len(text) <= _SHOWN and text.isprintable() else repr(text[:_SHOWN])


def _pairs(node: yaml.MappingNode, depth: int = 0) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """The keys and values of a mapping that ``<<`` brings from others: the nearest first.

    Raises:
        ValueError: Something else is to be merged; the message goes on with what is wrong.
    """
    if depth > _MAX_MERGES:
        raise ValueError("merges mappings that merge mappings, too deep")
    for key, value in node.value:
        if key.tag != yamlscalars.MERGE:
            continue
        for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if not isinstance(each, yaml.MappingNode):
                raise ValueError("must be a mapping, or a list of mappings")  # noqa: TRY004 (it is about what is written)
            yield from ((inner, theirs) for inner, theirs in each.value if inner.tag != yamlscalars.MERGE)
            yield from _pairs(each, depth + 1)


def _meant(key: str) -> str:
    return f'did you mean "{key}"?'


class Mapping:
    """A mapping at a path such as ``spec.containers[0]``, from which keys are taken."""

    def __init__(self, node: yaml.Node, path: str, source: str) -> None:
        self._path = path
        self._source = source
        self._node = node
        self._keys: dict[str, yaml.Node] = {}
        self._values: dict[str, yaml.Node] = {}
        #: The keys that were looked for, there or not: those that are known.
        self._known: set[str] = set()
        if not isinstance(node, yaml.MappingNode):
            raise self.error("", "must be a mapping")
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.error("", "has a key that is no text", key)
            if key.value in self._values:
                raise self.error(key.value, "stands there twice", key)
            if key.tag != yamlscalars.MERGE:
                self._keys[key.value], self._values[key.value] = key, value
        try:
            for key, value in _pairs(node):
                if not isinstance(key, yaml.ScalarNode):
                    raise self.error("", "has a key that is no text", key)
                # What stands here itself goes before what comes from elsewhere.
                if key.value not in self._values:
                    self._keys[key.value], self._values[key.value] = key, value
        except ValueError as error:
            raise self.error("<<", str(error)) from error

    def error(self, key: str, problem: str, node: yaml.Node | None = None) -> errors.UsageError:
        """An error at a key, or at this mapping itself."""
        if node is None:
            node = self._keys.get(key, self._node)
        name = self._below(key) or "the document"
        return errors.UsageError(f"{self._source}, line {node.start_mark.line + 1}: {name} {problem}")

    def line(self, key: str) -> int:
        """The line, from one on, in which a key stands, taken or not."""
        line: int = self._keys[key].start_mark.line + 1
        return line

    def kind(self, key: str) -> Literal["nothing", "scalar", "list", "mapping"]:
        """What stands at a key that has not been taken yet."""
        value = self._values.get(key)
        if value is None or value.tag == yamlscalars.NULL:
            return "nothing"
        if isinstance(value, yaml.SequenceNode):
            return "list"
        return "mapping" if isinstance(value, yaml.MappingNode) else "scalar"

    def _below(self, key: str) -> str:
        return ".".join(part for part in (self._path, shown(key)) if part)

    def _take(self, key: str) -> yaml.Node | None:
        """The value of a key, taken; None for a missing key and for null."""
        self._known.add(key)
        value = self._values.pop(key, None)
        if value is None or (isinstance(value, yaml.ScalarNode) and value.tag == yamlscalars.NULL):
            return None
        return value

    def _scalar(self, key: str, tags: tuple[str, ...], wanted: str) -> str | None:
        value = self._take(key)
        if value is None:
            return None
        if not isinstance(value, yaml.ScalarNode) or not value.tag.endswith(tags):
            raise self.error(key, f"must be {wanted}", value)
        text: str = value.value
        return text

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        value = self._scalar(key, _TEXT, self._string(key))
        if value is not None and "\0" in value:
            raise self.error(key, "must not contain a NUL character")
        return default if value is None else value

    def _string(self, key: str) -> str:
        node = self._values.get(key)
        like = "a truth value" if node is not None and node.tag == yamlscalars.BOOL else "a number"
        return f"a string (in quotes, where it looks like {like})"

    def literal(self, key: str) -> str:
        """A value as it is written, whatever YAML takes it for; empty where nothing stands."""
        value = self._scalar(key, _SCALARS, "a string") or ""
        if "\0" in value:
            raise self.error(key, "must not contain a NUL character")
        return value

    def required_text(self, key: str) -> str:
        """A string that must be there."""
        value = self.text(key)
        if not value:
            raise self.missing(key)
        return value

    def missing(self, key: str) -> errors.UsageError:
        """The error for a key that must be there: told at the key that was meant to be it, where there is one."""
        self._known.add(key)
        for error in self.unknown():
            if error.hint == _meant(key):
                return error
        return self.error(key, "is missing")

    def quantity(self, key: str) -> str:
        """A string or a number, as text."""
        node = self._values.get(key)
        written = self._scalar(key, (*_TEXT, ":int", ":float"), "a quantity") or ""
        number = yamlscalars.integer(written) if node is not None and node.tag == yamlscalars.INT else None
        return written if number is None else str(number)

    def boolean(self, key: str) -> bool | None:
        """True, false, or None where nothing stands."""
        value = self._scalar(key, (":bool",), "true or false")
        if value is None:
            return None
        if value not in yamlscalars.TRUE | yamlscalars.FALSE:
            raise self.error(key, "must be true or false")
        return value in yamlscalars.TRUE

    def truth(self, key: str, words: dict[str, bool]) -> bool | None:
        """True, false, or None where nothing stands: also as one of some words, or as a number that is one."""
        node = self._values.get(key)
        if node is not None and node.tag == yamlscalars.BOOL:
            return self.boolean(key)
        value = self._scalar(key, _SCALARS, "true or false")
        if value is not None and value not in words:
            raise self.error(key, "must be true or false")
        return None if value is None else words[value]

    def integer(self, key: str, low: int, high: int) -> int | None:
        """A whole number within limits, or None where nothing stands."""
        value = self._scalar(key, _NUMBER, "a whole number")
        if value is None:
            return None
        number = yamlscalars.whole(value)
        if number is None:
            raise self.error(key, "must be a whole number")
        if not low <= number <= high:
            raise self.error(key, f"must be between {low} and {high}")
        return number

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """One of some words."""
        value = self.text(key, default)
        if value not in allowed:
            raise self.error(key, f"is {value[:_SHOWN]!r}, which is none of {', '.join(allowed)}")
        return value

    def mapping(self, key: str) -> "Mapping | None":
        """A mapping, or None where nothing stands."""
        value = self._take(key)
        path = self._below(key)
        return None if value is None else Mapping(value, path, self._source)

    def mappings(self, key: str) -> list["Mapping"]:
        """A list of mappings."""
        path = self._below(key)
        return [Mapping(node, f"{path}[{number}]", self._source) for number, node in enumerate(self._items(key))]

    def _items(self, key: str) -> list[yaml.Node]:
        value = self._take(key)
        if value is None:
            return []
        if not isinstance(value, yaml.SequenceNode):
            raise self.error(key, "must be a list", value)
        items: list[yaml.Node] = value.value
        return items

    def texts(self, key: str) -> list[str] | None:
        """A list of strings, or None where nothing stands."""
        return self._list(key, _TEXT)

    def literals(self, key: str) -> list[str] | None:
        """A list of values as they are written, or None where nothing stands."""
        return self._list(key, _SCALARS)

    def _list(self, key: str, tags: tuple[str, ...]) -> list[str] | None:
        if key not in self._values:
            return None
        values = []
        for node in self._items(key):
            if not isinstance(node, yaml.ScalarNode) or not node.tag.endswith(tags):
                raise self.error(key, "must be a list of strings", node)
            if "\0" in node.value:
                raise self.error(key, "must not contain a NUL character", node)
            values.append(node.value)
        return values

    def integers(self, key: str, low: int, high: int) -> list[int]:
        """A list of whole numbers within limits."""
        values = []
        for node in self._items(key):
            number = None
            if isinstance(node, yaml.ScalarNode) and node.tag.endswith(_NUMBER):
                number = yamlscalars.whole(node.value)
            if number is None:
                raise self.error(key, "must be a list of whole numbers", node)
            if not low <= number <= high:
                raise self.error(key, f"must have numbers between {low} and {high}", node)
            values.append(number)
        return values

    def text_map(self, key: str) -> dict[str, str]:
        """A mapping of strings to strings."""
        inner = self.mapping(key)
        return {} if inner is None else {name: inner.text(name) for name in inner.left()}

    def left(self) -> list[str]:
        """What has not been taken yet."""
        return list(self._values)

    def skip(self, *keys: str) -> list[str]:
        """Take keys whose values don't matter; those that were there, as paths."""
        return [self._below(key) for key in keys if self._take(key) is not None]

    def unknown(self) -> Iterator[errors.UsageError]:
        """An error for each key that has not been taken; the hint names the one that may have been meant."""
        for key in self._values:
            error = self.error(key, "is not supported")
            near = difflib.get_close_matches(key, self._known, n=1, cutoff=_ALIKE)
            error.hint = _meant(near[0]) if near else ""
            yield error

    def end(self) -> None:
        """All that is supported has been taken.

        Raises:
            UsageError: Something is left; the sentence names the first of it, and the hint the key that may have been meant.
        """
        for error in self.unknown():
            raise error
