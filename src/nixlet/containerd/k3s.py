"""The configuration that k3s gives the containerd inside it, whose plugins are compiled in, the nix snapshotter's among them.

A containerd that is installed as a program has no plugin ``io.containerd.snapshotter.v1.nix``: it gets ours as a proxy plugin
(``containerd.config``). The tables here are for k3s and RKE2, and for comparing with what they render; they follow the templates of
k3s (pkg/agent/templates) for configuration versions 2 and 3.
"""

from nixlet import errors
from nixlet.containerd import config

#: The versions that k3s renders.
VERSIONS = (2, 3)

#: The nix snapshotter that is compiled into k3s's containerd.
NIX_PLUGIN = "io.containerd.snapshotter.v1.nix"
_STARGZ_PLUGIN = "io.containerd.snapshotter.v1.stargz"

#: For these k3s has pulls hand on the annotations of layers.
_READ_ANNOTATIONS = frozenset({config.NIX, config.STARGZ})


def tables(settings: config.ContainerdSettings, dropin_dir: str) -> config.Table:
    """The tables of k3s's configuration file.

    Args:
        settings: As for a containerd of our own. Not all of it has a place in k3s's.
        dropin_dir: What containerd itself reads beside that file.

    Raises:
        UnsupportedError: k3s has no such version.
    """
    if settings.version not in VERSIONS:
        raise errors.UnsupportedError(
            f"k3s has no containerd configuration of version {settings.version}", hint="use version 2 or 3"
        )
    plugins: config.Table = {
        "io.containerd.internal.v1.opt": {"path": settings.opt_dir},
        **(_cri_2(settings) if settings.version == 2 else _cri_3(settings)),
        **config.classes(settings),
        **_snapshotter(settings),
    }
    if settings.in_user_namespace and settings.version != 2:
        # Its socket lies in /var/run, where rootless nodes can't make one.
        plugins["io.containerd.nri.v1.nri"] = {"disable": True}
    return {
        "version": settings.version,
        "imports": [f"{dropin_dir}/*.toml"],
        "root": settings.root,
        "state": settings.state,
        "grpc": {"address": settings.address},
        "plugins": plugins,
    }


def _streaming() -> config.Table:
    return {"stream_server_address": "127.0.0.1", "stream_server_port": "10010"}


def _runtime(settings: config.ContainerdSettings) -> config.Table:
    table: config.Table = {
        "enable_selinux": settings.enable_selinux,
        "enable_unprivileged_ports": settings.enable_unprivileged,
        "enable_unprivileged_icmp": settings.enable_unprivileged,
        "device_ownership_from_security_context": settings.nonroot_devices,
    }
    if settings.disable_cgroup:
        table["disable_cgroup"] = True
    if settings.in_user_namespace:
        table |= {"disable_apparmor": True, "restrict_oom_score_adj": True}
    return table


def _runtimes(settings: config.ContainerdSettings) -> config.Table:
    systemd = {"SystemdCgroup": settings.systemd_cgroup}
    found: config.Table = {
        "runc": {"runtime_type": "io.containerd.runc.v2", "options": systemd},
        "runhcs-wcow-process": {"runtime_type": "io.containerd.runhcs.v1"},
    }
    for name, runtime in sorted(settings.runtimes.items()):
        found[name] = {"runtime_type": runtime.type, "options": {"BinaryName": runtime.program, **systemd}}
    return found


def _containerd(settings: config.ContainerdSettings) -> config.Table:
    table: config.Table = {"runtimes": _runtimes(settings)}
    if settings.default_runtime:
        table["default_runtime_name"] = settings.default_runtime
    return table


def _images(settings: config.ContainerdSettings) -> config.Table:
    annotations = settings.snapshotter in _READ_ANNOTATIONS
    return {"snapshotter": settings.snapshotter, "disable_snapshot_annotations": not annotations}


def _registry(settings: config.ContainerdSettings) -> config.Table:
    table: config.Table = {"config_path": settings.certs_dir}
    if settings.auths:
        table["configs"] = {host: {"auth": dict(auth)} for host, auth in sorted(settings.auths.items())}
    return table


def _cri_2(settings: config.ContainerdSettings) -> config.Table:
    cri: config.Table = {
        **_streaming(),
        **_runtime(settings),
        "containerd": {**_images(settings), **_containerd(settings)},
        "cni": {"bin_dir": settings.cni_bin_dir, "conf_dir": settings.cni_conf_dir},
        "registry": _registry(settings),
    }
    if settings.sandbox_image:
        cri["sandbox_image"] = settings.sandbox_image
    return {"io.containerd.grpc.v1.cri": cri}


def _cri_3(settings: config.ContainerdSettings) -> config.Table:
    images: config.Table = {
        **_images(settings),
        # With this, pulls stay with CRI: the Transfer service refuses the credentials of registries.
        "use_local_image_pull": True,
        "registry": _registry(settings),
    }
    if settings.sandbox_image:
        images["pinned_images"] = {"sandbox": settings.sandbox_image}
    runtime = {
        **_runtime(settings),
        "cni": {"bin_dirs": [settings.cni_bin_dir], "conf_dir": settings.cni_conf_dir},
        "containerd": _containerd(settings),
    }
    return {
        "io.containerd.grpc.v1.cri": _streaming(),
        "io.containerd.cri.v1.runtime": runtime,
        "io.containerd.cri.v1.images": images,
    }


def _snapshotter(settings: config.ContainerdSettings) -> config.Table:
    if settings.snapshotter == config.STARGZ:
        plugin = {
            "cri_keychain_image_service_path": config.STARGZ_SOCKET,
            "cri_keychain": {"enable_keychain": True},
            "registry": _registry(settings),
        }
        return {_STARGZ_PLUGIN: plugin}
    proxy = settings.proxy
    if proxy is None or proxy.name != config.NIX:
        return {}
    return {
        NIX_PLUGIN: {
            "address": proxy.address,
            "image_service": {"enable": True, "containerd_address": settings.address},
        },
        "io.containerd.transfer.v1.local": {
            "unpack_config": [
                {"platform": f"linux/{architecture}", "snapshotter": config.NIX, "differ": "walking"}
                for architecture in ("amd64", "arm64")
            ]
        },
    }
