"""What the values of settings must be like: each rule says in one sentence what is wrong with a value."""

import dataclasses
import ipaddress
import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from nixlet import errors
from nixlet.images import reference
from nixlet.kube import quantity
from nixlet.node.settings import config, names

#: Unix socket paths end at 108 bytes (unix(7)); containerd's shims add to ours.
_MAX_STATE_DIR = 60
_MAX_SOCKET = 107

#: A container's log that is smaller would be put aside all the time.
_MIN_LOG = 64 << 10

#: Interface names end at 15 characters, and the kernel refuses slashes and blanks.
_INTERFACE = re.compile(r"[^\s/:]{1,15}")
_BRIDGE = re.compile(r"[a-z][a-z0-9-]{0,14}")
_SNAPSHOTTER = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_RUNTIME = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")

#: Settings that must not be empty, and what they name.
_REQUIRED = {
    "data_dir": "a directory",
    "state_dir": "a directory",
    "private_registry": "a file, which need not exist",
    "containerd": "a program",
    "runc": "a program",
    "pause": "a program",
    "cni_bin_dirs": "a directory",
}


#: Files of a cluster's: their names in ``Settings``.
_FILES = (
    "token_file",
    "agent_token_file",
    "write_kubeconfig",
    "datastore_cafile",
    "datastore_certfile",
    "datastore_keyfile",
    "flannel_conf",
)


class _Problem(NamedTuple):
    """What is wrong with a value: the rest of a sentence that begins with the setting."""

    name: str
    what: str
    hint: str = ""


def checked(settings: config.Settings, called: Callable[[str], str] = names.flag) -> config.Settings:
    """Settings that a node can use, with absolute paths; endpoints become paths as well.

    Args:
        settings: What a person said.
        called: What an error calls a setting, from its name here: its flag, or the place where its value stands.

    Raises:
        UsageError: A value can't be used; the sentence names the setting.
    """
    for problem in _problems(settings):
        raise errors.UsageError(f"{called(problem.name)} {problem.what}", hint=problem.hint)
    return dataclasses.replace(
        settings,
        data_dir=os.path.abspath(settings.data_dir),
        state_dir=os.path.abspath(settings.state_dir),
        private_registry=os.path.abspath(settings.private_registry),
        resolv_conf=os.path.abspath(settings.resolv_conf) if settings.resolv_conf else "",
        log=os.path.abspath(settings.log) if settings.log else "",
        kubernetes="no" if settings.rootless else settings.kubernetes,
        **{name: os.path.abspath(getattr(settings, name)) for name in _FILES if getattr(settings, name)},
        container_runtime_endpoint=settings.container_runtime_endpoint.removeprefix(config.UNIX),
        image_service_endpoint=settings.image_service_endpoint.removeprefix(config.UNIX),
    )


def _problems(settings: config.Settings) -> Iterator[_Problem]:
    for name, value in dataclasses.asdict(settings).items():
        for text in (value,) if isinstance(value, str) else () if isinstance(value, bool) else value:
            if not text.isprintable():
                shown = "" if name in config.SECRET else f"{text!r} "
                yield _Problem(name, f"{shown}holds a line break, a control character or no UTF-8")
    yield from _rootless_problems(settings)
    yield from _path_problems(settings)
    yield from _network_problems(settings)
    yield from _image_problems(settings)
    yield from _log_problems(settings)
    yield from _cluster_problems(settings)
    if not _SNAPSHOTTER.fullmatch(settings.snapshotter):
        hint = 'use "nix", "overlayfs" or "native"'
        yield _Problem("snapshotter", f"{settings.snapshotter!r} is no snapshotter's name", hint)
    yield from _further_problems(settings)
    if settings.default_runtime and not _RUNTIME.fullmatch(settings.default_runtime):
        yield _Problem(
            "default_runtime", f"{settings.default_runtime!r} is no runtime's name", 'as in "crun" or "runsc"'
        )
    for name, known in (("strategy", ("auto", "view", "bind")), ("unsigned_paths", ("allow", "deny"))):
        if getattr(settings, name) not in known:
            yield _Problem(name, f"{getattr(settings, name)!r} is not known", f"use {' or '.join(known)}")
    if settings.containerd_restart not in config.RESTARTS:
        hint = f"use {' or '.join(config.RESTARTS)}"
        yield _Problem("containerd_restart", f"{settings.containerd_restart!r} is not known", hint)


def _rootless_problems(settings: config.Settings) -> Iterator[_Problem]:
    if not settings.rootless:
        return
    hint = "leave it out: an ordinary user's node is one alone, with a containerd of its own"
    if settings.kubernetes not in {"auto", "no"}:
        yield _Problem("kubernetes", f"{settings.kubernetes} can't be with rootless", hint)
    for name in ("server", "kubeconfig", "container_runtime_endpoint"):
        if getattr(settings, name):
            yield _Problem(name, "can't be with rootless", hint)
    for name, values in (
        ("snapshotter", [settings.snapshotter]),
        ("also_snapshotter", settings.also_snapshotter),
    ):
        for value in {"fuse-overlayfs", "stargz"}.intersection(values):
            yield _Problem(
                name,
                f"{value} can't be with rootless yet",
                "use nix, overlayfs or native, which an ordinary user's node can",
            )


def _further_problems(settings: config.Settings) -> Iterator[_Problem]:
    """Of further snapshotters."""
    seen = {settings.snapshotter}
    for name in settings.also_snapshotter:
        if not _SNAPSHOTTER.fullmatch(name):
            yield _Problem("also_snapshotter", f"{name!r} is no snapshotter's name", "as in stargz or overlayfs")
        elif name in seen:
            yield _Problem("also_snapshotter", f"names {name} once more", "leave it out")
        elif name in {"nix", "runc"}:
            what = "is the first snapshotter or none" if name == "nix" else "is a runtime's name"
            yield _Problem("also_snapshotter", f"can't be {name}, which {what}", "use --snapshotter nix")
        seen.add(name)
    if settings.also_snapshotter and settings.container_runtime_endpoint:
        yield _Problem(
            "also_snapshotter", "has no effect on a containerd that is there already", "configure that containerd"
        )


def _cluster_problems(settings: config.Settings) -> Iterator[_Problem]:
    """What can be told without a cluster's own rules (``cluster.validation``), which hold where there is one."""
    if settings.kubernetes not in config.KUBERNETES:
        hint = f"use {', '.join(config.KUBERNETES)}"
        yield _Problem("kubernetes", f"{settings.kubernetes!r} is not known", hint)
    if settings.kubernetes_bin_dir and not os.path.isabs(settings.kubernetes_bin_dir):
        yield _Problem("kubernetes_bin_dir", f"{settings.kubernetes_bin_dir!r} must be an absolute path")
    if (
        not re.fullmatch(r"[1-9][0-9]{0,4}", settings.https_listen_port, re.ASCII)
        or int(settings.https_listen_port) > 65535
    ):
        yield _Problem("https_listen_port", f"{settings.https_listen_port!r} is no port", "as in 6443")
    for name in settings.disable:
        if name.endswith((".yaml", ".yml", ".json")) or name.startswith("/"):
            yield _Problem(
                "disable", f"{name!r} is a file's name", "write a manifest's name without its ending, as in coredns"
            )
    if settings.server and not re.fullmatch(r"https://[^\s/?#@]+/?", settings.server, re.ASCII):
        # (not shown: a password may stand in it)
        yield _Problem("server", "is no server's URL", "as in https://192.0.2.7:6443")
    if settings.flannel_backend not in {"", "none", *config.FLANNEL_BACKENDS}:
        hint = f"use {', '.join(config.FLANNEL_BACKENDS)} or none"
        yield _Problem("flannel_backend", f"{settings.flannel_backend!r} is none that nixlet has", hint)
    if settings.flannel_iface and not _INTERFACE.fullmatch(settings.flannel_iface):
        yield _Problem("flannel_iface", f"{settings.flannel_iface!r} is no interface's name", "as in eth0")
    if settings.kubeconfig and settings.server:
        yield _Problem("kubeconfig", "and server are both set", "use one of them")
    for name in ("token", "agent_token"):
        if getattr(settings, name) and getattr(settings, f"{name}_file"):
            yield _Problem(name, f"and {names.key(f'{name}_file')} are both set", "use one of them")


def _log_problems(settings: config.Settings) -> Iterator[_Problem]:
    try:
        if quantity.parse(settings.container_log_max_size) < _MIN_LOG:
            yield _Problem("container_log_max_size", f"{settings.container_log_max_size} is less than 64Ki")
    except ValueError as error:
        yield _Problem("container_log_max_size", str(error), "as in 10Mi")
    if not re.fullmatch(r"[2-9]|[1-9]\d{1,3}", settings.container_log_max_files, re.ASCII):
        yield _Problem(
            "container_log_max_files", f"{settings.container_log_max_files!r} is no number from 2 to 9999", "as in 5"
        )


def _path_problems(settings: config.Settings) -> Iterator[_Problem]:
    for name, what in _REQUIRED.items():
        if not getattr(settings, name):
            yield _Problem(name, f"is empty: it must name {what}")
    for name in ("data_dir", "state_dir"):
        path = os.path.abspath(getattr(settings, name))
        if re.search(r"[:,\\\s\"]", path):
            yield _Problem(name, f"{path!r} holds a blank, colon, comma, quote or backslash")
    state_dir = os.path.abspath(settings.state_dir)
    if len(os.fsencode(state_dir)) > _MAX_STATE_DIR:
        yield _Problem(
            "state_dir", f"{state_dir} is longer than {_MAX_STATE_DIR} characters, which socket paths don't allow"
        )
    for name in ("cni_bin_dirs", "archive_dirs"):
        for directory in getattr(settings, name):
            if not os.path.isabs(directory):
                yield _Problem(name, f"{directory!r} must be an absolute path")
    for name in ("container_runtime_endpoint", "image_service_endpoint"):
        endpoint = getattr(settings, name)
        path = endpoint.removeprefix(config.UNIX)
        if endpoint and not os.path.isabs(path):
            yield _Problem(name, f"{endpoint!r} is not a Unix socket", "write unix:///PATH, or the absolute path alone")
        if len(os.fsencode(path)) > _MAX_SOCKET:
            yield _Problem(name, f"{endpoint} is longer than {_MAX_SOCKET} bytes, which socket paths don't allow")


def _network_problems(settings: config.Settings) -> Iterator[_Problem]:
    if not _BRIDGE.fullmatch(settings.bridge):
        yield _Problem("bridge", f"{settings.bridge!r} is no interface name of at most 15 lower-case characters")
    try:
        network = ipaddress.ip_network(settings.pod_cidr)
    except ValueError as error:
        yield _Problem("pod_cidr", f"{settings.pod_cidr!r} is not a network: {error}", "as in 10.63.0.0/16")
    else:
        if network.num_addresses < 8:
            yield _Problem("pod_cidr", f"{settings.pod_cidr} has room for fewer than five pods")
    if settings.health_address in {"", config.NO_HEALTH}:
        return
    host, _, port = settings.health_address.rpartition(":")
    hint = f"use 127.0.0.1:PORT, or {config.NO_HEALTH} for nowhere"
    if not host or not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > 65535:
        yield _Problem("health_address", f"{settings.health_address!r} is not HOST:PORT, with a port up to 65535", hint)
    elif not _is_loopback(host):
        what = f"{settings.health_address!r} is no loopback address, and what is served there is for this host alone"
        yield _Problem("health_address", what, hint)


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback and (address.version == 6) == host.startswith("[")


def _image_problems(settings: config.Settings) -> Iterator[_Problem]:
    for name in ("pause_image", "coredns_image"):
        try:
            if image := getattr(settings, name):
                reference.parse(image)
        except errors.NixletError as error:
            yield _Problem(name, f"can't be used: {error.message}", error.hint)
    for name in ("system_default_registry", "airgap_extra_registry"):
        value = getattr(settings, name)
        for registry in (value,) if isinstance(value, str) else value:
            # k3s takes a slash at the end of these.
            bare = registry.rstrip("/") if name == "airgap_extra_registry" else registry
            if (value or registry) and not _is_registry(bare):
                hint = (
                    "write HOST.DOMAIN, HOST:PORT or HOST.DOMAIN/PATH, without https:// and without a slash at the end"
                )
                yield _Problem(name, f"{registry!r} is no registry", hint)


def _is_registry(text: str) -> bool:
    """The grammar of references says what may stand in front of an image's name."""
    try:
        parsed = reference.parse(f"{text}/image")
    except errors.NixletError:
        return False
    return isinstance(parsed, reference.ImageReference) and str(parsed).startswith(f"{text}/")
