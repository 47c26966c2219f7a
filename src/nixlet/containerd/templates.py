"""The user's template of containerd's configuration: ``{{ template "base" . }}`` with tables around it, or all of the file.

k3s has Go's text/template there; ``encoding.gotemplate`` understands what such templates use of it. What stands around the base is
merged into it as drop-ins are: k3s puts the texts together, and a table that stands in both keeps its containerd from starting.
"""

import dataclasses
import tomllib
from collections.abc import Iterator
from typing import Any

from nixlet import errors
from nixlet.containerd import config, dropins, registries, tomlread
from nixlet.encoding import gotemplate_run, gotemplate_values

_SUPPORTED = (
    'there are {{ template "base" . }}, fields such as {{ .NodeConfig.AgentConfig.PauseImage }}, if, else, with, range, end, '
    f"{', '.join(sorted({*gotemplate_values.FUNCTIONS, 'and', 'or'}))}"
)

_BASE = "base"

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Line:
    """A line of the result, with the line of the template where it comes from."""

    text: str
    origin: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Header:
    """A line that opens a table."""

    path: Path
    origin: int
    is_array: bool


def fields(
    settings: config.ContainerdSettings,
    *,
    template_dir: str,
    image_service: str,
    said: registries.Registries,
    default_endpoint: bool,
) -> gotemplate_values.Struct:
    """What a template may ask for, by k3s's names (pkg/agent/templates: ContainerdConfig).

    Args:
        settings: Where the values come from.
        template_dir: The directory of the rendered file.
        image_service: The socket of the CRI image service; empty where it is containerd's.
        said: How registries are reached.
        default_endpoint: Whether a registry with mirrors is asked itself as well.
    """
    struct = gotemplate_values.Struct
    agent = {
        "CNIBinDir": settings.cni_bin_dir,
        "CNIConfDir": settings.cni_conf_dir,
        "ImageServiceSocket": image_service,
        "PauseImage": settings.sandbox_image,
        "Snapshotter": settings.snapshotter,
    }
    containerd = {
        "Address": settings.address,
        "BlockIOConfig": settings.blockio_config,
        "Opt": settings.opt_dir,
        "RDTConfig": settings.rdt_config,
        "Registry": settings.certs_dir,
        "Root": settings.root,
        "State": settings.state,
        "Template": template_dir,
    }
    node = {
        "AgentConfig": struct(agent),
        "Containerd": struct(containerd),
        "DefaultRuntime": settings.default_runtime,
        # A field of old: pods have a network here.
        "NoFlannel": False,
        "SELinux": settings.enable_selinux,
    }
    found = {
        name: struct({"RuntimeType": runtime.type, "BinaryName": runtime.program})
        for name, runtime in settings.runtimes.items()
    }
    return struct(
        {
            "DisableCgroup": settings.disable_cgroup,
            "EnableUnprivileged": settings.enable_unprivileged,
            "ExtraRuntimes": found,
            "IsRunningInUserNS": settings.in_user_namespace,
            "NoDefaultEndpoint": not default_endpoint,
            "NodeConfig": struct(node),
            "NonrootDevices": settings.nonroot_devices,
            "PrivateRegistryConfig": _registries(said),
            "Program": "nixlet",
            "SystemdCgroup": settings.systemd_cgroup,
        }
    )


def _registries(said: registries.Registries) -> gotemplate_values.Struct:
    """What is said of registries, by the names of k3s's types (github.com/rancher/wharfie/pkg/registries)."""
    struct = gotemplate_values.Struct
    mirrors = {
        name: struct(
            {
                "Endpoints": mirror.endpoints,
                "Rewrites": {rewrite.pattern.pattern: rewrite.replacement for rewrite in mirror.rewrites},
            }
        )
        for name, mirror in said.mirrors.items()
    }
    configs = {}
    for name, each in said.configs.items():
        auth = each.auth and struct(
            {
                "Username": each.auth.username,
                "Password": each.auth.password,
                "Auth": each.auth.auth,
                "IdentityToken": each.auth.identity_token,
            }
        )
        tls = each.tls and struct(
            {
                "CAFile": each.tls.ca_file,
                "CertFile": each.tls.cert_file,
                "KeyFile": each.tls.key_file,
                "InsecureSkipVerify": each.tls.skip_verify,
            }
        )
        configs[name] = struct({"Auth": auth, "TLS": tls})
    return struct({"Mirrors": mirrors, "Configs": configs, "Auths": {}})


def tables(
    data: bytes, path: str, base: config.Table, values: gotemplate_values.Struct, own_import: str = ""
) -> config.Table:
    """What a template makes of the base, with what it has left out of that which is the node's.

    Args:
        data: The template.
        path: Where it stands.
        base: What ``{{ template "base" . }}`` stands for.
        values: The fields, as from ``fields``.
        own_import: The pattern of our own drop-ins, which k3s's templates import; they are merged anyway.

    Raises:
        UsageError: It can't be understood, its result is no TOML, or it takes from the node what is the node's.
    """
    pieces = list(gotemplate_run.executed(tomlread.decoded(data, path), path, values, _SUPPORTED))
    bases = [number for number, piece in enumerate(pieces) if piece.calls]
    for number in bases:
        if pieces[number].calls != _BASE:
            raise errors.UsageError(
                f'{path}, line {pieces[number].line}: there is no template "{pieces[number].calls}"', hint=_SUPPORTED
            )
    if len(bases) > 1:
        first, second = (pieces[number].line for number in bases[:2])
        raise errors.UsageError(f"{path}, line {second}: the base is there already, at line {first}")
    lines = _lines_around(pieces, bases[0], path) if bases else list(_lines(pieces))
    made = dropins.DropIn(path, _parsed(lines, path))
    return dropins.merged_template(base, made, has_base=bool(bases), own_import=own_import)


def _parsed(lines: list[_Line], path: str) -> config.Table:
    text = "\n".join(line.text for line in lines)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _explained(error, text, lines, path) from error


def _lines(pieces: list[gotemplate_run.Piece]) -> Iterator[_Line]:
    """The lines of the result: one that is made of several pieces comes from the first that has something of it."""
    text, origin = "", 0
    for piece in pieces:
        for number, part in enumerate(piece.text.split("\n")):
            if number:
                yield _Line(text, origin or piece.line + number - 1)
                text, origin = "", 0
            text += part
            if part and not origin:
                origin = piece.line + number
    yield _Line(text, origin or (pieces[-1].line if pieces else 1))


def _lines_around(pieces: list[gotemplate_run.Piece], at: int, path: str) -> list[_Line]:
    """The lines above and below the base, each of which make sense by themselves."""
    above, below = list(_lines(pieces[:at])), list(_lines(pieces[at + 1 :]))
    _parsed(above, path)
    for line in below:
        written = line.text.strip()
        if written.startswith("["):
            break
        if written and not written.startswith("#"):
            # The base's last table is still open there, and which that is nobody should have to know.
            raise errors.UsageError(
                f"{path}, line {line.origin}: {written.split('=')[0].strip()} belongs to no table",
                hint='write the line of its table above it; keys without one go above {{ template "base" . }}',
            )
    _parsed(below, path)
    return [*above, *below]


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


def _explained(error: tomllib.TOMLDecodeError, text: str, lines: list[_Line], path: str) -> errors.UsageError:
    """The error, told by the template's line."""
    clash = _clash(lines, path)
    if clash is not None:
        return clash
    what, number, _ = tomlread.problem(error, text)
    return errors.UsageError(f"{path}, line {lines[number - 1].origin}: this makes no TOML: {what}")


def _clash(lines: list[_Line], path: str) -> errors.UsageError | None:
    """The error for the first table that is there already."""
    seen: dict[Path, _Header] = {}
    for header in _headers(lines):
        before = seen.get(header.path)
        if before is not None and not (header.is_array and before.is_array):
            return errors.UsageError(
                f"{path}, line {header.origin}: the table [{tomlread.name(header.path)}] is there already, at line {before.origin}",
                hint="put what it shall have below one of the two lines",
            )
        # The tables of an array's next element are not those of the one before.
        below = len(header.path)
        seen = {key: each for key, each in seen.items() if key[:below] != header.path} | {header.path: header}
    return None
