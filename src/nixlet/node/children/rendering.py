"""containerd's configuration as the node's own containerd gets it: rendered, put through the user's template, drop-ins merged.

The user's files stand beside the rendered one, under k3s's names (``Layout.template``, ``Layout.dropin_dir``). A version of
containerd's configuration has a template and drop-ins of its own. containerd reads older versions than its own, so what was written for
one of those is obeyed: the newest version for which there is something is the one that is rendered.
"""

import dataclasses
import logging
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nixlet import errors
from nixlet.containerd import config as containerd_config
from nixlet.containerd import criplugins, dropins, k3s, registries, runtimes, tomlread
from nixlet.host import cgroups, files, userns
from nixlet.images import platforms
from nixlet.node.children import cgroupdriver
from nixlet.node.images import pause
from nixlet.node.requirements import plugins, preflight
from nixlet.node.settings import config as node_config
from nixlet.node.settings import trusted

#: k3s's own pause image, which it puts into its configuration.
_K3S_PAUSE = "rancher/mirrored-pause:3.6"

#: Linux 4.11 has it; older kernels have no way to let a container open ports below 1024.
_UNPRIVILEGED_PORTS = "/proc/sys/net/ipv4/ip_unprivileged_port_start"

_log = logging.getLogger("nixlet.node")


@dataclasses.dataclass(frozen=True, slots=True)
class Rendered:
    """A configuration of containerd.

    Attributes:
        table: What stands in it.
        text: Its file.
        sources: The user's files that went into it.
    """

    table: containerd_config.Table
    text: str
    sources: Sequence[str] = ()

    def without_secrets(self) -> "Rendered":
        """The same for people to look at: what proves somebody to a registry is left out."""
        table = containerd_config.without_secrets(self.table)
        return Rendered(table, containerd_config.dump(table, table["version"], self.sources), self.sources)


def write(
    settings: node_config.Settings,
    layout: node_config.Layout,
    *,
    program: containerd_config.ContainerdProgram,
    runc: str,
    cni_bin_dir: str,
    said: registries.Registries | None = None,
) -> str:
    """Write the configuration of the node's containerd; its path.

    Args:
        settings: The node's settings.
        layout: Where things are.
        program: The containerd that will read it.
        runc: The OCI runtime program.
        cni_bin_dir: Where the CNI plugins are.
        said: How registries are reached; their credentials stand in the configuration.

    Raises:
        UsageError: A template or drop-in can't be used, or there is no such default runtime.
        UnsupportedError: This containerd can't have more than one snapshotter.
        PermissionDeniedError: Somebody else can write one of them.
    """
    if settings.also_snapshotter and program.version.startswith("1.6."):
        raise errors.UnsupportedError(
            f"containerd {program.version} has one snapshotter for all pods, and also-snapshotter names more",
            hint="use containerd 1.7 or later",
        )
    version = choose_version(layout, program.config_version)
    rendered = render(settings, layout, version=version, runc=runc, cni_bin_dir=cni_bin_dir, said=said)
    for source in rendered.sources:
        _log.info("containerd's configuration is made with %s", source)
    _warn(settings, rendered, version, said or registries.Registries())
    # (containerd 2 came with version 3)
    cgroupdriver.tell(settings, layout, cgroupdriver.of_containerd(rendered.table), is_asked=program.config_version > 2)
    files.make_directory(os.path.dirname(layout.containerd_config))
    # Credentials may come from anywhere: registries.yaml, a drop-in, a template.
    files.write_atomically(layout.containerd_config, rendered.text, mode=0o600)
    return layout.containerd_config


def choose_version(layout: node_config.Layout, spoken: int) -> int:
    """The version to render: the newest with a template or drop-ins that containerd reads, or that which it speaks.

    Args:
        layout: Where templates and drop-ins are.
        spoken: The version that containerd speaks.
    """
    written = {version: list(_user_files(layout, version)) for version in reversed(containerd_config.VERSIONS)}
    version = next((version for version, found in written.items() if found and version <= spoken), spoken)
    for other, found in written.items():
        for path in found if other != version else ():
            _log.warning("%s is not used: containerd's configuration is rendered in version %d", path, version)
    return version


def render(
    settings: node_config.Settings,
    layout: node_config.Layout,
    *,
    version: int,
    runc: str,
    cni_bin_dir: str,
    said: registries.Registries | None = None,
    user_files: bool = True,
    looked_at: bool = False,
) -> Rendered:
    """The configuration of the node's containerd in one version.

    Args:
        settings: The node's settings.
        layout: Where things are.
        version: 2, 3 or 4.
        runc: The OCI runtime program.
        cni_bin_dir: Where the CNI plugins are.
        said: How registries are reached.
        user_files: Whether the version's template and drop-ins are obeyed.
        looked_at: It is for somebody to look at, who isn't the service that the node is.

    Raises:
        NixletError: As from ``write``.
    """
    driver = (cgroupdriver.at_last_start if looked_at else cgroupdriver.wanted)(settings, layout)
    wanted = _containerd_settings(settings, layout, version, runc, cni_bin_dir, said, driver)
    table = containerd_config.tables(wanted)
    sources: Sequence[str] = ()
    if user_files:
        table, sources = _with_user_files(settings, layout, wanted, table, said or registries.Registries())
    _check_default_runtime(table)
    _unpack_for_runtimes(table)
    return Rendered(table, containerd_config.dump(table, version, sources), sources)


def render_for_k3s(
    settings: node_config.Settings,
    layout: node_config.Layout,
    *,
    version: int,
    cni_bin_dir: str,
    said: registries.Registries | None = None,
) -> Rendered:
    """What k3s would render for its own containerd, at the places of ``layout``.

    Raises:
        UnsupportedError: k3s does not render that version.
    """
    last, allowed = cgroupdriver.of_last_start(layout), cgroups.systemd_makes_ours()
    driver = last or (cgroupdriver.SYSTEMD if allowed else cgroupdriver.CGROUPFS)
    wanted = _containerd_settings(settings, layout, version, "runc", cni_bin_dir, said, driver)
    wanted = dataclasses.replace(
        wanted,
        opt_dir=wanted.root,
        sandbox_image=_from_registry(settings.pause_image or _K3S_PAUSE, settings.system_default_registry),
        systemd_cgroup=wanted.systemd_cgroup and not wanted.in_user_namespace,
    )
    table = k3s.tables(wanted, layout.dropin_dir(version))
    _check_default_runtime(table)
    return Rendered(table, containerd_config.dump(table, version))


def _containerd_settings(
    settings: node_config.Settings,
    layout: node_config.Layout,
    version: int,
    runc: str,
    cni_bin_dir: str,
    said: registries.Registries | None,
    driver: str,
) -> containerd_config.ContainerdSettings:
    in_user_namespace = userns.is_inside()
    return containerd_config.ContainerdSettings(
        version=version,
        root=layout.containerd_root,
        state=layout.containerd_state,
        address=layout.containerd_socket,
        opt_dir=layout.opt,
        snapshotter=settings.snapshotter,
        proxies=[each.proxy for each in plugins.of_node(settings, layout)],
        further=settings.also_snapshotter,
        sandbox_image=_from_registry(settings.pause_image, settings.system_default_registry) or pause.REFERENCE,
        cni_bin_dir=cni_bin_dir,
        cni_conf_dir=layout.cni_conf_dir,
        runc=runc,
        runc_root=layout.runc_root,
        nri_socket=layout.nri_socket,
        restrict_oom_score_adj=preflight.lacks_sys_resource(),
        architecture=platforms.host_platform().architecture,
        certs_dir=layout.certs_dir,
        auths=said.auths() if said is not None else {},
        default_runtime=settings.default_runtime,
        runtimes=runtimes.discover(os.environ.get("PATH", os.defpath)),
        enable_selinux=settings.selinux,
        enable_unprivileged=os.path.exists(_UNPRIVILEGED_PORTS),
        nonroot_devices=settings.nonroot_devices,
        in_user_namespace=in_user_namespace,
        disable_cgroup=in_user_namespace and not cgroups.are_ours(),
        systemd_cgroup=driver == cgroupdriver.SYSTEMD,
        blockio_config=_beside(layout, "blockio_config.yaml"),
        rdt_config=_beside(layout, "rdt_config.yaml"),
    )


def _image_service(settings: node_config.Settings, layout: node_config.Layout) -> str:
    """Where k3s has its kubelet ask for images: as there, only certain snapshotters have a service of their own; empty: the others."""
    plugin = plugins.of(settings, layout)
    own = "" if plugin is None else layout.node_socket if plugin.is_ours else plugin.images
    return own or settings.image_service_endpoint


def _from_registry(image: str, registry: str) -> str:
    """An image's name in the registry that the node's own images come from."""
    return f"{registry}/{image}" if image and registry and not image.startswith(f"{registry}/") else image


def _beside(layout: node_config.Layout, name: str) -> str:
    """The path of a file beside the rendered one, if it is there."""
    path = os.path.join(os.path.dirname(layout.containerd_config), name)
    return path if os.path.isfile(path) else ""


def _user_files(layout: node_config.Layout, version: int) -> Iterator[str]:
    """A version's template, if there is one, and its drop-ins in alphabetical order."""
    template, directory = layout.template(version), layout.dropin_dir(version)
    if os.path.lexists(template):
        yield template
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    except OSError as error:
        raise errors.UsageError(f"the directory of drop-ins {directory} can't be read: {error.strerror}") from error
    yield from (os.path.join(directory, name) for name in sorted(names) if name.endswith(".toml") and name[0] != ".")


def _with_user_files(
    settings: node_config.Settings,
    layout: node_config.Layout,
    wanted: containerd_config.ContainerdSettings,
    base: containerd_config.Table,
    said: registries.Registries,
) -> tuple[containerd_config.Table, list[str]]:
    template, directory = layout.template(wanted.version), layout.dropin_dir(wanted.version)
    sources = list(_user_files(layout, wanted.version))
    found = {path: trusted.read(path, tomlread.MAX_BYTES) for path in sources}
    table = base
    if template in found:
        # Few nodes have one.
        from nixlet.containerd import templates  # noqa: PLC0415 (see above)

        values = templates.fields(
            wanted,
            template_dir=os.path.dirname(template),
            image_service=_image_service(settings, layout),
            said=said,
            default_endpoint=not settings.disable_default_registry_endpoint,
        )
        own_import = f"{directory}/*.toml"
        table = templates.tables(found.pop(template), template, base, values, own_import)
    if found:
        trusted.check_directory(directory)
    read = [dropins.DropIn(path, tomlread.parsed(data, path)) for path, data in found.items()]
    result = dropins.merged(table, read)
    elsewhere = _elsewhere(result, layout)
    if elsewhere is not None and (said.mirrors or said.configs) and not _registry(result, "mirrors"):
        raise errors.UsageError(
            f"{_who_says(read, template, result)}: with registry.config_path = {elsewhere!r} nothing that {settings.private_registry} "
            "says would be obeyed",
            hint=f"take config_path out, or what {settings.private_registry} says",
        )
    return result, sources


def _who_says(read: Sequence[dropins.DropIn], template: str, result: containerd_config.Table) -> str:
    """The file that says where registries' files are."""
    key = (*dropins.registry_plugin(result), "registry", "config_path")
    return next((file.path for file in read if tomlread.at(file.table, key) is not None), template)


def registries_elsewhere(layout: node_config.Layout) -> str | None:
    """Where the written configuration has containerd look for how registries are reached; None: in the node's directory."""
    with open(layout.containerd_config, "rb") as file:
        return _elsewhere(tomllib.load(file), layout)


def _elsewhere(table: Mapping[str, Any], layout: node_config.Layout) -> str | None:
    said = _registry(table, "config_path")
    return None if said == layout.certs_dir else said or ""


def _registry(table: Mapping[str, Any], *path: str) -> Any:  # noqa: ANN401 (any value of TOML)
    """What CRI is told of registries."""
    return tomlread.at(table, criplugins.place(table["version"], "images", "registry", *path))


def _check_default_runtime(table: containerd_config.Table) -> None:
    """Check the outcome: a drop-in may have brought the runtime."""
    there, default = runtimes.configured(table)
    name = default or "runc"
    if name != "runc" and name not in there:
        raise errors.UsageError(
            f"default runtime {name} was not found",
            hint=f"there are {', '.join(sorted({'runc', *there}))}; install it on PATH, or add it by a drop-in",
        )


def _unpack_for_runtimes(table: containerd_config.Table) -> None:
    """Let images be pulled for runtimes that a drop-in gave snapshotters of their own.

    CRI's pulls go through the Transfer service in these versions, which unpacks for the snapshotters that it is told of.
    """
    there, _ = runtimes.configured(table)
    wanted = {each["snapshotter"] for each in there.values() if each.get("snapshotter")}
    entries = tomlread.at(table, ("plugins", "io.containerd.transfer.v1.local", "unpack_config"))
    if table["version"] == 2 or not wanted or not isinstance(entries, list):
        return
    platforms_there = dict.fromkeys(each["platform"] for each in entries)
    for snapshotter in sorted(wanted - {each["snapshotter"] for each in entries}):
        # Where containerd knows of optional ones, one that isn't there is the trouble of its pods alone.
        more = {"snapshotter": snapshotter, "differ": "walking", "optional": True}
        entries.extend({"platform": each, **more} for each in platforms_there)


def _warn(settings: node_config.Settings, rendered: Rendered, version: int, said: registries.Registries) -> None:
    missing = [host for host in sorted(said.auths()) if not _registry(rendered.table, "configs", host, "auth")]
    if missing:
        _log.warning(
            "credentials for %s are configured, but containerd's configuration has none: its template must include the base",
            ", ".join(missing),
        )
    if tomlread.at(rendered.table, ("plugins", k3s.NIX_PLUGIN)):
        _log.warning("containerd has no plugin %s: the nix snapshotter is a proxy plugin here", k3s.NIX_PLUGIN)
    if version > 2 and userns.is_inside() and not cgroups.are_ours():
        _log.warning("no cgroups are delegated to this user namespace, and containerd 2 runs no pods without")
    if not settings.selinux and os.path.exists("/sys/fs/selinux/enforce"):
        _log.warning("SELinux is enabled on this host, but containers are not labelled: --selinux is not set")
    if settings.selinux and "container_runtime_t" not in _selinux_context():
        _log.warning("--selinux is set, but this process does not run as container_runtime_t: a policy may be missing")


def _selinux_context() -> str:
    try:
        with open("/proc/self/attr/current", encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
