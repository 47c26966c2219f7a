"""Where a node's settings come from: flags, the environment, configuration files, and last the defaults.

The files are ``config.yaml`` and the drop-ins ``config.yaml.d/*.yaml``, read as k3s reads its own: a key is a flag's name without
dashes, a list stands for a flag that is given several times, the last file that has a key wins, and ``key+`` appends to what the
files before it said. What k3s skips with a warning is refused here: a misspelt key would silently leave its default in force.
"""

import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from nixlet import errors
from nixlet.node.settings import config, k3skeys, names, rules, trusted

if TYPE_CHECKING:
    from nixlet.encoding import yamlread

Value = bool | str | tuple[str, ...]

#: Flags with one letter, which may be keys as well.
SHORT = {"d": "data_dir", "i": "node_ip", "l": "log", "s": "server", "t": "token"}

_DEFAULTS: Mapping[str, Value] = dataclasses.asdict(config.Settings())
_KEYS = {names.key(name): name for name in _DEFAULTS}
_NAMES = _KEYS | SHORT

_K3S = frozenset((*k3skeys.PASSED_OVER, *k3skeys.REFUSED))

#: Go's words for truth values (strconv.ParseBool), which k3s takes on the command line and in the environment.
_BOOLEANS = dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True) | dict.fromkeys(
    ("0", "f", "F", "FALSE", "false", "False"), False
)


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """Where a setting's value was said.

    Attributes:
        source: The kind of place; "default" where nobody said anything.
        places: A flag, an environment variable, or places in files ("/etc/nixlet/config.yaml, line 3"): several where a value
            was appended to.
    """

    source: Literal["flag", "environment", "file", "default"]
    places: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For a person: the place, or "default"."""
        return "; ".join(self.places) or self.source

    def called(self, name: str) -> str:
        """What a sentence calls the setting there."""
        if self.source == "default":
            return names.flag(name)
        return f"{self}: {names.key(name)}" if self.source == "file" else str(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Configuration:
    """A node's settings, and how they came about.

    Attributes:
        settings: The settings, checked.
        origins: Where each was said, by the names of ``Settings``.
        files: The files that were read, in their order.
        warnings: What was passed over, and why.
    """

    settings: config.Settings
    origins: Mapping[str, Origin]
    files: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def load(flags: Mapping[str, object], environment: Mapping[str, str], *, file: str | None = None) -> Configuration:
    """Put a node's configuration together.

    Args:
        flags: The command line by the names of ``Settings``: a truth value or a word for one, text, or several texts; None and
            no texts at all stand for "not given". Those of ``k3skeys`` may be among them.
        environment: NIXLET_ variables: an empty one counts as not set; several values are parted by commas.
        file: The configuration file that the command line names.

    Raises:
        UsageError: A value or a key can't be used; the sentence names the place.
        PermissionDeniedError: Somebody else can write a file.
        UnsupportedError: Something asks for what k3s has and nixlet hasn't.
    """
    warnings = [_of_k3s(key, f"--{key}") for key in _K3S if flags.get(key.replace("-", "_")) not in {None, ()}]
    own = names.defaults(environment)
    values: dict[str, Value] = {name: own.get(name, default) for name, default in _DEFAULTS.items()}
    origins = dict.fromkeys(_DEFAULTS, Origin("default"))
    files = tuple(_files(file, environment))
    for path in files:
        for name, value, place, appends in _entries(path, warnings):
            before = origins[name].places if appends else ()
            earlier = values[name] if before else ()
            assert isinstance(earlier, tuple)
            values[name] = (*earlier, *value) if isinstance(value, tuple) else value
            origins[name] = Origin("file", (*before, place))
    for name, default in _DEFAULTS.items():
        variable = names.variable(name)
        if environment.get(variable):
            values[name] = _from_text(environment[variable], default, variable)
            origins[name] = Origin("environment", (variable,))
        given = flags.get(name)
        if given is None or given == ():
            continue
        values[name] = _from_flag(given, default, names.flag(name))
        origins[name] = Origin("flag", (names.flag(name),))
    settings = config.Settings(**values)  # type: ignore[arg-type]  # each is of its default's type
    checked = rules.checked(settings, lambda name: origins[name].called(name))
    return Configuration(checked, origins, files, tuple(warnings))


def _from_text(text: str, default: Value, place: str) -> Value:
    if isinstance(default, bool):
        return _boolean(text, place)
    return tuple(filter(None, text.split(","))) if isinstance(default, tuple) else text


def _from_flag(given: object, default: Value, place: str) -> Value:
    if isinstance(default, bool):
        return given if isinstance(given, bool) else _boolean(str(given), place)
    return tuple(map(str, given)) if isinstance(default, tuple) and isinstance(given, Iterable) else str(given)


def _boolean(text: str, place: str) -> bool:
    if text not in _BOOLEANS:
        from nixlet.encoding import yamlread  # noqa: PLC0415 (see _documents)

        raise errors.UsageError(f"{place} must be true or false, not {yamlread.shown(text)!r}")
    return _BOOLEANS[text]


def _files(chosen: str | None, environment: Mapping[str, str]) -> Iterator[str]:
    """The main file, if it is there, and its drop-ins in alphabetical order."""
    named = chosen or environment.get(names.FILE_VARIABLE)
    default = names.defaults(environment)["file"]
    path = named or default
    if "://" in path:
        raise errors.UsageError(f"the configuration file {path} is a URL; configuration is read from files alone")
    path = os.path.abspath(path)
    if path == os.devnull:
        return
    drop_ins = list(_drop_ins(f"{path}.d"))
    if os.path.lexists(path):
        yield path
    elif named and not drop_ins:
        raise errors.UsageError(
            f"the configuration file {path} does not exist",
            hint=f"{'--config' if chosen else names.FILE_VARIABLE} names it; without, {default} is read if it is there",
        )
    yield from drop_ins


def _drop_ins(directory: str) -> Iterator[str]:
    try:
        with os.scandir(directory) as entries:
            found = sorted(entry.name for entry in entries if not entry.is_dir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise errors.UsageError(f"the configuration directory {directory} can't be read: {error.strerror}") from error
    trusted.check_directory(directory)
    yield from (os.path.join(directory, name) for name in found if name.lower().endswith((".yaml", ".yml")))


def _of_k3s(key: str, place: str) -> str:
    """What there is to say of a key or flag that k3s has and that means nothing here.

    Raises:
        UnsupportedError: Somebody would miss it.
    """
    if key in k3skeys.REFUSED:
        raise errors.UnsupportedError(
            f"{place} is k3s's, and not supported: {k3skeys.REFUSED[key][0]}", hint="leave it out"
        )
    return f"{place} is passed over: {k3skeys.PASSED_OVER[key][0]}"


def _entries(path: str, warnings: list[str]) -> Iterator[tuple[str, Value, str, bool]]:
    """The settings of one file: name, value, place, and whether the value is appended; ``warnings`` learns of what is passed over."""
    documents = _documents(path)
    if len(documents) > 1:
        raise documents[1].error("", "is one too many: a configuration file has one")
    for document in documents:
        for written in document.left():
            name = _NAMES.get(written.removesuffix("+"))
            if name is None and written.removesuffix("+") in _K3S:
                warnings.append(_of_k3s(written.removesuffix("+"), document.error(written, "").message.rstrip()))
                document.skip(written)
                continue
            if name is None:
                raise _unknown(document, written)
            place = f"{path}, line {document.line(written)}"
            yield name, _value(document, written, name), place, written.endswith("+")


def _documents(path: str) -> "list[yamlread.Mapping]":
    # Most nodes have no such file, and YAML's reader takes long to import.
    from nixlet.encoding import yamlread  # noqa: PLC0415 (see above)

    text = trusted.read(path, yamlread.MAX_BYTES)
    try:
        return list(yamlread.documents(text, path))
    except errors.UsageError as error:
        # What is no character has no line for the YAML reader, only an offset.
        offset = getattr(error.__cause__, "position", None)
        if offset is None:
            raise
        lines = text[:offset].split(b"\n")
        place = f"{path}, line {len(lines)}, column {len(lines[-1]) + 1}"
        raise errors.UsageError(
            f"{place}: this is no YAML: there is a control character, or something that is not UTF-8"
        ) from error


def _value(document: "yamlread.Mapping", written: str, name: str) -> Value:
    default, kind = _DEFAULTS[name], document.kind(written)
    if kind == "nothing":
        raise document.error(written, "has no value: leave the line out to keep the default")
    if isinstance(default, tuple):
        texts = [document.literal(written)] if kind == "scalar" else document.literals(written)
        return tuple(texts or ())
    if written.endswith("+"):
        raise document.error(written, f"can't be: {names.key(name)} has one value, to which nothing can be appended")
    if isinstance(default, bool):
        # YAML's words for truth values, and those that the flag takes, in quotes or not.
        return bool(document.truth(written, _BOOLEANS))
    return document.literal(written)


def _unknown(document: "yamlread.Mapping", written: str) -> errors.NixletError:
    known = written.removesuffix("+").lstrip("-")
    if known in {"config", "c"}:
        return document.error(
            written, f"can't stand in a configuration file, only on the command line or as {names.FILE_VARIABLE}"
        )
    error = document.error(written, "is not a known key")
    near = difflib.get_close_matches(known.replace("_", "-").lower(), _KEYS, n=1)
    error.hint = (
        f'did you mean "{near[0]}"?' if near else "keys are flags without dashes: nixlet server --help lists them"
    )
    return error
