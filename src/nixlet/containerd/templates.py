"""The user's template of containerd's configuration: text with ``{{ template "base" . }}`` and fields of the node in it.

k3s has Go's text/template there. Nearly all templates are the base with tables around it, so that is what is understood, with k3s's
names for the fields; whatever else Go's language has is refused with its line, rather than rendered wrongly.
"""

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from nixlet import errors
from nixlet.containerd import config, tomlread

#: An action: what stands between braces, with the marks that trim the white space around it (pkg.go.dev/text/template).
_ACTION = re.compile(
    r"""\{\{ (?P<trim_left>-(?=\s))? \s* (?P<body> /\*.*?\*/ | (?: "(?:\\.|[^"\\])*" | `[^`]*` | [^"`] )*? ) \s*?
        (?P<trim_right>(?<=\s)-)? \}\}""",
    re.VERBOSE | re.DOTALL,
)
_BASE = re.compile(r'template\s+(?:"base"|`base`)\s+\.')
_FIELD = re.compile(r"(?:\.[A-Za-z_][A-Za-z0-9_]*)+")

_SUPPORTED = 'use {{ template "base" . }} and fields such as {{ .NodeConfig.AgentConfig.PauseImage }} alone'

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a rendered template.

    Attributes:
        text: The piece.
        line: The line in the template where it comes from.
        is_base: Whether it is the base.
    """

    text: str
    line: int
    is_base: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class _Line:
    """A line of the result, with the line of the template where it comes from; 0: the base."""

    text: str
    origin: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Header:
    """A line that opens a table."""

    path: Path
    origin: int
    is_array: bool


def fields(settings: config.ContainerdSettings, *, template_dir: str, image_service: str) -> dict[str, str]:
    """What a template may ask for, by k3s's names (pkg/agent/templates: ContainerdConfig).

    Args:
        settings: Where the values come from.
        template_dir: The directory of the rendered file.
        image_service: The socket of the CRI image service; empty where it is containerd's.
    """
    values: dict[str, str | bool] = {
        ".DisableCgroup": settings.disable_cgroup,
        ".EnableUnprivileged": settings.enable_unprivileged,
        ".IsRunningInUserNS": settings.in_user_namespace,
        ".NonrootDevices": settings.nonroot_devices,
        ".NodeConfig.AgentConfig.CNIBinDir": settings.cni_bin_dir,
        ".NodeConfig.AgentConfig.CNIConfDir": settings.cni_conf_dir,
        ".NodeConfig.AgentConfig.ImageServiceSocket": image_service,
        ".NodeConfig.AgentConfig.PauseImage": settings.sandbox_image,
        ".NodeConfig.AgentConfig.Snapshotter": settings.snapshotter,
        ".NodeConfig.Containerd.Address": settings.address,
        ".NodeConfig.Containerd.BlockIOConfig": settings.blockio_config,
        ".NodeConfig.Containerd.Opt": settings.opt_dir,
        ".NodeConfig.Containerd.RDTConfig": settings.rdt_config,
        ".NodeConfig.Containerd.Registry": settings.certs_dir,
        ".NodeConfig.Containerd.Root": settings.root,
        ".NodeConfig.Containerd.State": settings.state,
        ".NodeConfig.Containerd.Template": template_dir,
        ".NodeConfig.DefaultRuntime": settings.default_runtime,
        ".NodeConfig.SELinux": settings.enable_selinux,
        ".Program": "nixlet",
        ".SystemdCgroup": settings.systemd_cgroup,
    }
    return {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}


def tables(data: bytes, path: str, base: config.Table, values: Mapping[str, str]) -> config.Table:
    """What a template makes of the base.

    Args:
        data: The template.
        path: Where it stands.
        base: What ``{{ template "base" . }}`` stands for.
        values: The fields, as from ``fields``.

    Raises:
        UsageError: It can't be understood, or its result is no TOML; the sentence names its line.
    """
    pieces = list(render(tomlread.decoded(data, path), path, config.dump(base, base["version"]), values))
    bases = [piece.line for piece in pieces if piece.is_base]
    if len(bases) > 1:
        raise errors.UsageError(f"{path}, line {bases[1]}: the base is there already, at line {bases[0]}")
    lines = list(_lines(pieces))
    text = "\n".join(line.text for line in lines)
    _check_keys_below_base(lines, path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _explained(error, text, lines, path, base) from error


def render(text: str, path: str, base: str, values: Mapping[str, str]) -> Iterator[Piece]:
    """The result of a template, piece by piece.

    Raises:
        UsageError: There is something that is not understood.
    """
    place, trim = 0, False
    for action in _ACTION.finditer(text):
        line = text.count("\n", 0, action.start()) + 1
        yield from _plain(text, path, place, action.start(), trim_left=trim, trim_right=bool(action["trim_left"]))
        place, trim = action.end(), bool(action["trim_right"])
        body = action["body"].strip()
        if _BASE.fullmatch(body):
            yield Piece(base, line, is_base=True)
        elif body in values:
            yield Piece(values[body], line)
        elif not body.startswith("/*"):
            raise _refused(body, f"{path}, line {line}", values)
    yield from _plain(text, path, place, len(text), trim_left=trim, trim_right=False)


def _plain(text: str, path: str, start: int, end: int, *, trim_left: bool, trim_right: bool) -> Iterator[Piece]:
    piece = text[start:end]
    line = text.count("\n", 0, start) + 1
    if "{{" in piece:
        line += piece.count("\n", 0, piece.index("{{"))
        raise errors.UsageError(f"{path}, line {line}: {{{{ is not closed by }}}}")
    if trim_left:
        trimmed = piece.lstrip()
        line += piece[: len(piece) - len(trimmed)].count("\n")
        piece = trimmed
    yield Piece(piece.rstrip() if trim_right else piece, line)


def _refused(body: str, place: str, values: Mapping[str, str]) -> errors.UsageError:
    shown = " ".join(body.split())
    shown = f"{{{{ {shown if len(shown) < 60 else f'{shown[:57]}...'} }}}}"
    if not _FIELD.fullmatch(body):
        return errors.UsageError(f"{place}: {shown} is not supported in a template", hint=_SUPPORTED)
    near = difflib.get_close_matches(body, values, n=1)
    if any(name.startswith(f"{body}.") for name in values):
        return errors.UsageError(
            f"{place}: {shown} is no single value", hint=f"as in {{{{ {near[0]} }}}}" if near else ""
        )
    hint = f"did you mean {{{{ {near[0]} }}}}?" if near else f"there are {', '.join(values)}"
    return errors.UsageError(f"{place}: there is no field {shown}", hint=hint)


def _lines(pieces: list[Piece]) -> Iterator[_Line]:
    """The lines of the result: one that is made of several pieces comes from the first that is the template's."""
    text, origin = "", 0
    for piece in pieces:
        for number, part in enumerate(piece.text.split("\n")):
            if number:
                yield _Line(text, origin)
                text, origin = "", 0
            text += part
            if part and not piece.is_base and not origin:
                origin = piece.line + number
    yield _Line(text, origin)


def _check_keys_below_base(lines: list[_Line], path: str) -> None:
    """The base's last table is still open below it, and which that is nobody should have to know."""
    last = max((number for number, line in enumerate(lines) if not line.origin and line.text.strip()), default=None)
    for line in lines[last + 1 :] if last is not None else ():
        written = line.text.strip()
        if written.startswith("["):
            return
        if written and not written.startswith("#"):
            raise errors.UsageError(
                f"{path}, line {line.origin}: {written.split('=')[0].strip()} belongs to no table",
                hint='write the line of its table above it; keys without one go above {{ template "base" . }}',
            )


def _headers(lines: list[_Line]) -> Iterator[_Header]:
    for line in lines:
        written = line.text.strip()
        if not written.startswith("["):
            continue
        try:
            table: Any = tomllib.loads(written)
        except tomllib.TOMLDecodeError:
            continue
        path: list[str] = []
        while isinstance(table, dict) and table:
            ((key, table),) = table.items()
            path.append(key)
            if isinstance(table, list):
                table = table[0]
        yield _Header(tuple(path), line.origin, written.startswith("[["))


def _explained(
    error: tomllib.TOMLDecodeError, text: str, lines: list[_Line], path: str, base: config.Table
) -> errors.UsageError:
    """The error, told by the template's line: what it says by itself may be about a line of the base."""
    what, number, _ = tomlread.problem(error, text)
    clash = _clash(lines, path, base)
    if clash is not None:
        return clash
    if origin := lines[number - 1].origin:
        return errors.UsageError(f"{path}, line {origin}: this makes no TOML: {what}")
    written = lines[number - 1].text.strip()
    return errors.UsageError(f"{path} and its base make no TOML: {what}, at the base's line {written}")


def _clash(lines: list[_Line], path: str, base: config.Table) -> errors.UsageError | None:
    """The error for the first table of the template that is there already, in the base or in the template itself."""
    has_base = any(not line.origin and line.text.strip() for line in lines)
    seen: dict[Path, _Header] = {}
    for header in _headers(lines):
        if not header.origin:
            continue
        before = seen.get(header.path)
        if has_base and _declares(base, header.path, is_array=header.is_array):
            first = "in the base"
            directory = f"{config.stem(base['version'])}.toml.d"
            hint = f"put what it shall have into a file in {directory}, beside the template: those are merged into the base"
        elif before is not None and not (header.is_array and before.is_array):
            first, hint = f"at line {before.origin}", "put what it shall have below one of the two lines"
        else:
            # The tables of an array's next element are not those of the one before.
            below = len(header.path)
            seen = {key: each for key, each in seen.items() if key[:below] != header.path} | {header.path: header}
            continue
        return errors.UsageError(
            f"{path}, line {header.origin}: the table [{tomlread.name(header.path)}] is there already, {first}",
            hint=hint,
        )
    return None


def _declares(base: config.Table, path: Path, *, is_array: bool) -> bool:
    """Whether the base has a line for that table, or a value in its place. A table that only holds tables has none."""
    found: Any = base
    for key in path:
        if not isinstance(found, dict) or key not in found:
            return False
        found = found[key]
    if not isinstance(found, dict) or is_array:
        return True
    return not found or any(not isinstance(value, dict) for value in found.values())
