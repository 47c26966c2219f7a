"""What stargz-snapshotter is started with: its configuration, and what it shows registries (its docs/overview.md)."""

import base64
import json
import logging
import os
from typing import Any

import tomli_w

from nixlet.containerd import registries
from nixlet.host import files
from nixlet.node.requirements import plugins
from nixlet.node.settings import config as node_config

#: Docker Hub's name in docker's configuration.
_DOCKER_HUB = "https://index.docker.io/v1/"

_log = logging.getLogger("nixlet.node")


def write(plugin: plugins.Plugin, layout: node_config.Layout, said: registries.Registries) -> dict[str, str]:
    """Write its files, which it reads when it starts; what it has to find in its environment.

    Args:
        plugin: The snapshotter.
        layout: Where things are.
        said: How registries are reached.
    """
    root = plugin.proxy.root
    files.make_directory(root, mode=0o700)
    text = tomli_w.dumps(configuration(layout, said))
    files.write_atomically(plugins.stargz_config(layout), text, mode=0o600)
    write_logins(plugin, said)
    return {"DOCKER_CONFIG": root}


def write_logins(plugin: plugins.Plugin, said: registries.Registries) -> None:
    """Write what it shows registries, which it reads at each request (blocking)."""
    path = os.path.join(plugin.proxy.root, "config.json")
    files.write_atomically(path, json.dumps(_logins(said)), mode=0o600)


def configuration(layout: node_config.Layout, said: registries.Registries) -> dict[str, Any]:
    """Its configuration."""
    mirrors = {name: {"mirrors": found} for name in said.mirrors if (found := _mirrors(name, said))}
    return {
        "metadata_store": "memory",
        "no_prometheus": True,
        # What a pull brings along to show a registry is kept for what is read later.
        "cri_keychain": {"enable_keychain": True, "image_service_path": layout.containerd_socket},
        # It has that in memory alone: a layer that it can't read any more is no reason for it not to start again.
        "snapshotter": {"allow_invalid_mounts_on_restart": True},
        **({"resolver": {"host": mirrors}} if mirrors else {}),
    }


def _mirrors(name: str, said: registries.Registries) -> list[dict[str, Any]]:
    """The mirrors of a registry that it can ask; from others containerd pulls all of an image."""
    found: list[dict[str, Any]] = []
    for text in said.mirrors[name].endpoints:
        try:
            endpoint = registries.normalised(text)
        except registries.InvalidEndpointError:
            # (containerd's own files are made of it as well, where that is told)
            continue
        scheme, _, rest = endpoint.url.partition("://")
        if name == registries.EVERY or endpoint.override_path or said.mirrors[name].rewrites:
            _log.warning(
                "stargz can't ask %s, the mirror of %s: it knows neither mirrors of every registry, nor paths and rewrites",
                registries.shown(text),
                name,
            )
            continue
        found.append({"host": rest.partition("/")[0], "insecure": scheme == "http"})
    return found


def _logins(said: registries.Registries) -> dict[str, Any]:
    """Credentials as docker's configuration has them (docs.docker.com, "docker login")."""
    auths: dict[str, dict[str, str]] = {}
    for host, config in said.configs.items():
        if config.auth is None or host == registries.EVERY:
            continue
        user, password = config.auth.login()
        entry = {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()} if user else {}
        if config.auth.identity_token:
            entry["identitytoken"] = config.auth.identity_token
        auths[_DOCKER_HUB if registries.default_host(host) == registries.default_host("docker.io") else host] = entry
    return {"auths": auths}
