"""containerd's configuration, in the version that the containerd at hand speaks.

Version 2 is that of containerd 1.6 and 1.7, 3 came with 2.0, 4 with 2.3. Which one is asked of the program, never derived
from its version. Everything that would lie at the system's own paths is put elsewhere: containerd ignores keys that it doesn't
know without a word, so the tests look for every value in what ``containerd config dump`` makes of the file.

The tables follow containerd's docs/PLUGINS.md, docs/cri/config.md and what its ``config default`` prints.
"""

import asyncio
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w

from nixlet import errors
from nixlet.containerd import proxyplugins
from nixlet.containerd.runtimes import Runtime
from nixlet.host import process

#: The snapshotter that is ours.
NIX = "nix"

#: One whose roots are made by a program in place of the kernel.
FUSE_OVERLAYFS = "fuse-overlayfs"

#: Where stargz-snapshotter serves unless it is told otherwise; it is a program of its own, with this socket on every node.
STARGZ = "stargz"
STARGZ_SOCKET = "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock"

Table = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ContainerdSettings:
    """What a node wants of its containerd.

    Attributes:
        version: The version of the configuration: 2, 3 or 4.
        root: Its persistent data.
        state: Its running state.
        address: Its socket; ttrpc's is beside it.
        opt_dir: Its directory for installed programs and NRI plugins, which must not be the system's.
        snapshotter: The snapshotter for images and containers.
        proxies: The snapshotters that are programs of their own; all others containerd has built in, or a drop-in says where they are.
        further: Further snapshotters; a runtime of its name has each.
        sandbox_image: The image that holds a pod's namespaces; empty: containerd's own choice.
        cni_bin_dir: Where the CNI plugins are.
        cni_conf_dir: Where the network's configuration is.
        runc: The OCI runtime program.
        runc_root: Its state.
        nri_socket: Where NRI plugins connect.
        restrict_oom_score_adj: Never ask for a better OOM score than our own; needed without CAP_SYS_RESOURCE.
        architecture: This machine's, in Go's words.
        certs_dir: How registries are reached, ``HOST/hosts.toml``; empty: as they are named.
        auths: What registries want to see, by host: the keys username, password, auth and identitytoken.
        default_runtime: The runtime of pods that name none; empty: runc.
        runtimes: Further runtimes, by name.
        enable_selinux: Label containers.
        enable_unprivileged: Containers may open ports below 1024 and ping without a capability (Linux 4.11 and later).
        nonroot_devices: Containers of ordinary users own the devices that they get.
        in_user_namespace: containerd's root is not the machine's.
        disable_cgroup: Start containers without cgroups; containerd 2 can't.
        systemd_cgroup: systemd makes the cgroups, so that pods name slices.
        blockio_config: The classes of block I/O; empty: none.
        rdt_config: The classes of Intel RDT; empty: none.
    """

    version: int
    root: str
    state: str
    address: str
    opt_dir: str
    snapshotter: str
    proxies: Sequence[proxyplugins.ProxyPlugin]
    sandbox_image: str
    cni_bin_dir: str
    cni_conf_dir: str
    runc: str
    runc_root: str
    nri_socket: str
    restrict_oom_score_adj: bool
    architecture: str
    further: Sequence[str] = ()
    certs_dir: str = ""
    auths: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    default_runtime: str = ""
    runtimes: Mapping[str, Runtime] = dataclasses.field(default_factory=dict)
    enable_selinux: bool = False
    enable_unprivileged: bool = True
    nonroot_devices: bool = False
    in_user_namespace: bool = False
    disable_cgroup: bool = False
    systemd_cgroup: bool = False
    blockio_config: str = ""
    rdt_config: str = ""

    @property
    def proxy(self) -> proxyplugins.ProxyPlugin | None:
        """The proxy plugin that is the snapshotter for images and containers; None: it is none."""
        return next((each for each in self.proxies if each.name == self.snapshotter), None)


@dataclasses.dataclass(frozen=True, slots=True)
class ContainerdProgram:
    """A containerd that was asked about itself.

    Attributes:
        path: The program.
        version: Its version, "2.2.9".
        config_version: The version of the configuration that it speaks.
    """

    path: str
    version: str
    config_version: int


async def ask(path: str) -> ContainerdProgram:
    """Ask a containerd for its version and for that of its configuration.

    Raises:
        UnavailableError: There is no such program.
        UnsupportedError: It speaks a configuration that nixlet can't render.
        CommandFailedError: It does not answer.
    """
    # A large program, which takes its time to start: both at once.
    questions = (["--version"], ["config", "default"])
    answers = await asyncio.gather(*(process.run([path, *question], timeout=20) for question in questions))
    printed, default = (answer.check().stdout.decode(errors="replace") for answer in answers)
    found = re.search(r"\bv?(\d+\.\d+\.\d+[^\s~+]*)", printed)
    version = found[1] if found else printed.strip().partition("\n")[0][:40]
    line = re.search(r"^version = (\d+)$", default, re.MULTILINE)
    if line is None:
        raise errors.UnsupportedError(
            f"{path} ({version}) is no containerd: it names no version of its configuration",
            hint="name the containerd program: --containerd",
        )
    config_version = int(line[1])
    if config_version not in _TABLES:
        known = ", ".join(map(str, VERSIONS))
        raise errors.UnsupportedError(
            f"{path} ({version}) speaks configuration version {config_version}, and nixlet renders {known}",
            hint="use containerd 1.6 to 2.4",
        )
    return ContainerdProgram(path, version, config_version)


def render(settings: ContainerdSettings) -> str:
    """The text of containerd's configuration file, with nothing of the user's in it."""
    return dump(tables(settings), settings.version)


def tables(settings: ContainerdSettings) -> Table:
    """The tables of containerd's configuration file."""
    return _TABLES[settings.version](settings)


def dump(table: Table, version: int, sources: Sequence[str] = ()) -> str:
    """The text of a configuration file.

    Args:
        table: What stands in it.
        version: Its version.
        sources: The user's files that it is made of as well.
    """
    header = (
        f"# File generated by nixlet. DO NOT EDIT. Use {stem(version)}.toml.tmpl or {stem(version)}.toml.d instead.\n"
    )
    header += "".join(f"# With {source}\n" for source in sources)
    return f"{header}\n{tomli_w.dumps(table)}"


#: What is secret of the credentials for a registry: containerd's docs/cri/registry.md, and its "auths" and "headers" of old.
_SECRETS = frozenset({"password", "auth", "identitytoken"})
_HIDDEN = "(hidden)"

#: Who asks, in a URL (RFC 3986, 3.2.1).
_USER_INFO = re.compile(r"(?<=://)[^/?#\s]*@")


def without_secrets(table: Table) -> Table:
    """A configuration with a mark in the place of each secret: what registries want to see, and who asks in a URL.

    They are looked for everywhere, however their keys are written: containerd's reader takes capital letters for small ones.
    """
    return {_in_url(key): _hidden(key, value) for key, value in table.items()}


def _hidden(key: str, value: object, *, whole: bool = False) -> object:
    name = key.casefold()
    whole = whole or name == "headers"
    if isinstance(value, dict):
        return {_in_url(inner): _hidden(inner, each, whole=whole) for inner, each in value.items()}
    if whole or name in _SECRETS:
        return _HIDDEN
    if isinstance(value, list):
        return [_hidden("", each) for each in value]
    return _in_url(value) if isinstance(value, str) else value


def _in_url(text: str) -> str:
    return _USER_INFO.sub(f"{_HIDDEN}@", text)


def stem(version: int) -> str:
    """What the names of a version's files begin with; k3s's: that without a number is version 2."""
    return "config" if version == 2 else f"config-v{version}"


def _runtimes(settings: ContainerdSettings) -> Table:
    systemd = {"SystemdCgroup": settings.systemd_cgroup}
    options = {"BinaryName": settings.runc, "Root": settings.runc_root, **systemd}
    found: Table = {"runc": {"runtime_type": "io.containerd.runc.v2", "options": options}}
    for name, runtime in sorted(settings.runtimes.items()):
        if runtime.is_shim:
            # By path: it may lie where containerd doesn't look.
            found[name] = {"runtime_type": runtime.type, "runtime_path": runtime.program, "options": systemd}
        else:
            found[name] = {"runtime_type": runtime.type, "options": {**options, "BinaryName": runtime.program}}
    for name in settings.further:
        # containerd 1.6 knows no such key.
        found[name] = {**found["runc"], "snapshotter": name}
    return found


def _cri_runtime(settings: ContainerdSettings) -> Table:
    table: Table = {
        "enable_selinux": settings.enable_selinux,
        "enable_unprivileged_ports": settings.enable_unprivileged,
        "enable_unprivileged_icmp": settings.enable_unprivileged,
        "device_ownership_from_security_context": settings.nonroot_devices,
        "restrict_oom_score_adj": settings.restrict_oom_score_adj or settings.in_user_namespace,
        # Beside the running state, not in the system's /var/run/netns.
        "netns_mounts_under_state_dir": True,
    }
    return {**table, "disable_apparmor": True} if settings.in_user_namespace else table


def _streaming() -> Table:
    return {"stream_server_address": "127.0.0.1", "stream_server_port": "0"}


def _registry(settings: ContainerdSettings) -> Table:
    table: Table = {"config_path": settings.certs_dir} if settings.certs_dir else {}
    if settings.auths:
        table["configs"] = {host: {"auth": dict(auth)} for host, auth in sorted(settings.auths.items())}
    return {"registry": table} if table else {}


def _proxy_plugins(settings: ContainerdSettings) -> Table:
    return {"proxy_plugins": {each.name: each.table() for each in settings.proxies}} if settings.proxies else {}


def _common_plugins(settings: ContainerdSettings) -> Table:
    nri: Table = {
        "socket_path": settings.nri_socket,
        # What lies in these directories is started with containerd; the system's plugins are for the system's containerd.
        "plugin_path": f"{settings.opt_dir}/nri/plugins",
        "plugin_config_path": f"{settings.opt_dir}/nri/conf.d",
    }
    if settings.in_user_namespace:
        nri = {"disable": True, **nri}
    return {
        "io.containerd.internal.v1.opt": {"path": settings.opt_dir},
        "io.containerd.nri.v1.nri": nri,
        "io.containerd.transfer.v1.local": {"unpack_config": unpack_config(settings)},
        **classes(settings),
    }


def unpack_config(settings: ContainerdSettings) -> list[Table]:
    """What the Transfer service may unpack; it refuses every snapshotter that is not named there, but for the default one."""
    architectures = dict.fromkeys(("amd64", "arm64", settings.architecture))
    return [
        {"platform": f"linux/{architecture}", "snapshotter": settings.snapshotter, "differ": "walking"}
        for architecture in architectures
    ]


def classes(settings: ContainerdSettings) -> Table:
    """Where the classes of block I/O and of Intel RDT are, for the tasks service (containerd 1.6 knows the latter alone)."""
    files = {"blockio_config_file": settings.blockio_config, "rdt_config_file": settings.rdt_config}
    table = {key: file for key, file in files.items() if file}
    return {"io.containerd.service.v1.tasks-service": table} if table else {}


def _top(settings: ContainerdSettings) -> Table:
    return {"version": settings.version, "root": settings.root, "state": settings.state}


def _sockets(settings: ContainerdSettings) -> Mapping[str, Table]:
    return {"grpc": {"address": settings.address}, "ttrpc": {"address": f"{settings.address}.ttrpc"}}


def _tables_2(settings: ContainerdSettings) -> Table:
    cri: Table = {
        **_streaming(),
        **_cri_runtime(settings),
        "cni": {"bin_dir": settings.cni_bin_dir, "conf_dir": settings.cni_conf_dir},
        "containerd": {
            "snapshotter": settings.snapshotter,
            "default_runtime_name": settings.default_runtime or "runc",
            # Pulls then pass the annotations of layers on to the snapshotter.
            "disable_snapshot_annotations": not any(each.reads_annotations for each in settings.proxies),
            "runtimes": _runtimes(settings),
        },
        **_registry(settings),
    }
    if settings.sandbox_image:
        cri["sandbox_image"] = settings.sandbox_image
    if settings.disable_cgroup:
        cri["disable_cgroup"] = True
    # 1.6 has neither NRI nor the Transfer service and passes their tables over.
    plugins = {**_common_plugins(settings), "io.containerd.grpc.v1.cri": cri}
    return {**_top(settings), **_sockets(settings), "plugins": plugins, **_proxy_plugins(settings)}


def _plugins_of_containerd_2(settings: ContainerdSettings) -> Table:
    # Annotations reach the snapshotter without disable_snapshot_annotations = false, which would only make CRI warn
    # and give up the Transfer service.
    images: Table = {"snapshotter": settings.snapshotter, **_registry(settings)}
    if settings.sandbox_image:
        images["pinned_images"] = {"sandbox": settings.sandbox_image}
    if settings.auths:
        # The Transfer service refuses a configuration with these.
        images["use_local_image_pull"] = True
        if any(each.asks_registries for each in settings.proxies):
            # It tells what image a layer is of by itself, CRI when it is told to.
            images["disable_snapshot_annotations"] = False
    runtime = {
        **_cri_runtime(settings),
        "containerd": {
            "default_runtime_name": settings.default_runtime or "runc",
            "runtimes": _runtimes(settings),
        },
        "cni": {"bin_dirs": [settings.cni_bin_dir], "conf_dir": settings.cni_conf_dir},
    }
    return {
        **_common_plugins(settings),
        "io.containerd.cri.v1.images": images,
        "io.containerd.cri.v1.runtime": runtime,
        "io.containerd.grpc.v1.cri": _streaming(),
    }


def _tables_3(settings: ContainerdSettings) -> Table:
    plugins = _plugins_of_containerd_2(settings)
    return {**_top(settings), **_sockets(settings), "plugins": plugins, **_proxy_plugins(settings)}


def _tables_4(settings: ContainerdSettings) -> Table:
    # The tables [grpc] and [ttrpc] are ignored in version 4, without a word: they are plugins there.
    servers = {f"io.containerd.server.v1.{name}": table for name, table in _sockets(settings).items()}
    plugins = {**_plugins_of_containerd_2(settings), **servers}
    return {**_top(settings), "plugins": plugins, **_proxy_plugins(settings)}


_TABLES = {2: _tables_2, 3: _tables_3, 4: _tables_4}

#: The versions that can be rendered.
VERSIONS = tuple(sorted(_TABLES))
