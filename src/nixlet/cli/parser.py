"""The command line's reading, for what is well-formed.

Reading ``nixlet ps`` with click takes longer than all that is left to do. So what has nothing wrong with it, and asks neither for
help nor for completion, is read here, and everything else by click from the same declarations (``clickadapter``), which knows how to
tell. The two agree wherever this one has an answer: ``tests/unit/cli/test_parser.py``.
"""

from nixlet.cli import grammar, verbs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any


#: Of a number; with so many it has its place in 64 bits.
_MOST_DIGITS = 18


class _Declined(Exception):
    """This is not for us to tell."""


def parse(arguments: "Sequence[str]", environment: "Mapping[str, str]") -> grammar.Parsed | None:
    """Read a command line; None: click has to.

    Raises:
        NixletError: A default can't be found out.
    """
    rest = list(arguments)
    debug = rest[:1] == ["--debug"]
    if debug:
        del rest[0]
    # What click makes of a variable for a flag is its affair.
    if verbs.COMPLETION_VARIABLE in environment or environment.get(verbs.DEBUG_VARIABLE) or not rest:
        return None
    found = verbs.find(rest.pop(0))
    if isinstance(found, grammar.Group):
        found = found.verbs.get(rest.pop(0)) if rest else None
    if found is None:
        return None
    try:
        values = _values(found, rest, environment)
    except _Declined:
        return None
    return grammar.Parsed(found, values, debug=debug, debug_flag=debug)


def _values(verb: grammar.Verb, rest: list[str], environment: "Mapping[str, str]") -> "dict[str, Any]":
    given, words = _split(verb, rest)
    values = _arguments(verb, words)
    missing = []
    for option in verb.options:
        texts = given.get(option.name, [])
        if not texts and option.variable and (text := environment.get(option.variable)):
            if isinstance(option, (grammar.Flag, grammar.Values)):
                raise _Declined
            texts = [text]
        if not isinstance(option, grammar.Values):
            texts = texts[-1:]
        if option.choices and any(text not in option.choices for text in texts):
            raise _Declined
        if isinstance(option, grammar.Flag):
            values[option.name] = bool(texts)
        elif isinstance(option, grammar.Values):
            values[option.name] = tuple(texts)
        elif texts:
            values[option.name] = _number(texts[0]) if isinstance(option, grammar.Number) else texts[0]
        elif option.required:
            raise _Declined
        else:
            missing.append(option)
    # To find a default out may take some time, and an error of it would hide one of the command line.
    for option in missing:
        values[option.name] = option.default() if callable(option.default) else option.default
    return values


def _split(verb: grammar.Verb, rest: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The options' values by name, those of flags empty; and the arguments."""
    known = {flag: option for option in verb.options for flag in option.flags}
    given: dict[str, list[str]] = {}
    words: list[str] = []
    while rest:
        word = rest.pop(0)
        if word == "--":
            break
        if word[:1] != "-" or word == "-":
            words.append(word)
            if verb.interspersed:
                continue
            break
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            if flag in known:
                _take(known[flag], [value] if equals else [], rest, given)
            elif verb.passes_unknown:
                words.append(word)
            else:
                raise _Declined
        elif verb.passes_unknown and not any(flag[1] != "-" for flag in known):
            words.append(word)
        else:
            _short(word[1:], known, rest, given)
    return given, words + rest


def _short(letters: str, known: "Mapping[str, grammar.Option]", rest: list[str], given: dict[str, list[str]]) -> None:
    """Flags of one letter that stand together, the last of which may have its value behind it."""
    while letters:
        option = known.get(f"-{letters[0]}")
        if option is None:
            raise _Declined
        letters = letters[1:]
        if isinstance(option, grammar.Flag):
            _take(option, [], rest, given)
        else:
            _take(option, [letters] if letters else [], rest, given)
            return


def _take(option: grammar.Option, value: list[str], rest: list[str], given: dict[str, list[str]]) -> None:
    """Note an option with its value, if it has one: the one that is joined to it, or the next word."""
    texts = given.setdefault(option.name, [])
    if isinstance(option, grammar.Flag):
        if value:
            raise _Declined
        texts.append("")
    elif isinstance(option, grammar.Truth):
        if value and len(value[0]) > 1 and value[0][0] == "-":
            # click takes that for the next option.
            raise _Declined
        if not value and (not rest or (len(rest[0]) > 1 and rest[0][0] == "-")):
            value = ["true"]
        texts.append(value[0] if value else rest.pop(0))
    elif value:
        texts += value
    elif rest:
        texts.append(rest.pop(0))
    else:
        raise _Declined


def _arguments(verb: grammar.Verb, words: list[str]) -> "dict[str, Any]":
    values: dict[str, Any] = {}
    for argument in verb.arguments:
        if argument.several:
            values[argument.name] = tuple(words)
            words = []
        else:
            values[argument.name] = words.pop(0) if words else argument.default
        value = values[argument.name]
        if (not value and value != "" and argument.required) or (argument.choices and value not in argument.choices):
            raise _Declined
    if words:
        raise _Declined
    return values


def _number(text: str) -> int:
    found = number(text)
    if found is None:
        raise _Declined
    return found


def number(text: str) -> int | None:
    """What a text says of a ``grammar.Number``; None: it is none."""
    # int() takes more than people mean (1_0, other alphabets), and not all that has only digits.
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else None
