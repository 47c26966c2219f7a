"""The files of a kubelet's configuration, and what people's say of things that a node has to know: where it listens, and where its pods' cgroups are.

A kubelet takes up all files ``*.conf`` of the directory, also of those below it, one after the other by their names, and its arguments count more
(Kubernetes: "Set Kubelet Parameters Via A Configuration File"; the keys are those of kubelet.config.k8s.io/v1beta1).
"""

import os
from collections.abc import Iterator
from types import MappingProxyType

from nixlet.cluster.layout import Layout
from nixlet.encoding import yamlread
from nixlet.node.settings import config, trusted

#: Ours among them, and the copy of the one that ``--kubelet-arg config=FILE`` names, as k3s has it: it comes after ours, and before others.
_DEFAULTS, _NAMED = "00-nixlet-defaults.conf", "10-cli-config.conf"

#: Keys, and the arguments that mean the same.
_ARGUMENTS = MappingProxyType(
    {
        "address": "address",
        "port": "port",
        "healthzBindAddress": "healthz-bind-address",
        "healthzPort": "healthz-port",
        "cgroupDriver": "cgroup-driver",
        "cgroupRoot": "cgroup-root",
    }
)


def directory(layout: Layout) -> str:
    """The directory of the kubelet's configuration; k3s's name."""
    return os.path.join(layout.agent, "etc", "kubelet.conf.d")


def defaults(layout: Layout) -> str:
    """Our part of the kubelet's configuration; a person's files beside it come after it."""
    return os.path.join(directory(layout), _DEFAULTS)


def named(layout: Layout) -> str:
    """The copy of the file that ``--kubelet-arg config=FILE`` names."""
    return os.path.join(directory(layout), _NAMED)


def argument(settings: config.Settings, layout: Layout, key: str) -> str:
    """What a person has said for one of the kubelet's arguments, there or in a file; empty: nothing.

    Args:
        settings: The node's.
        layout: Where things are.
        key: The argument's name.

    Raises:
        NixletError: As ``said``.
    """
    return config.kubelet_argument(settings, key) or said(settings, layout).get(key, "")


def said(settings: config.Settings, layout: Layout) -> dict[str, str]:
    """What people's files say, by the arguments that mean the same; of a node without a kubelet nothing.

    Args:
        settings: The node's.
        layout: Where things are.

    Raises:
        UsageError: One can't be read, or is no mapping in YAML.
        PermissionDeniedError: Somebody else can write one.
    """
    found: dict[str, str] = {}
    if settings.kubernetes == "no" or settings.disable_agent:
        return found
    for path in _files(settings, directory(layout)):
        for document in yamlread.documents(trusted.read(path, yamlread.MAX_BYTES), path):
            for key in _ARGUMENTS.keys() & set(document.left()):
                # (nothing there undoes what an earlier file says: JSON merge patch, RFC 7386)
                found[_ARGUMENTS[key]] = document.literal(key)
    return {name: value for name, value in found.items() if value}


def _files(settings: config.Settings, top: str) -> Iterator[str]:
    """People's files in the order in which they count."""
    found = {}
    for path, _, names in os.walk(top):
        for name in names:
            if name.endswith(".conf"):
                place = os.path.join(path, name)
                found[tuple(os.path.relpath(place, top).split("/"))] = place
    for ours in (_DEFAULTS, _NAMED):
        found.pop((ours,), None)
    if chosen := config.kubelet_argument(settings, "config"):
        found[_NAMED,] = chosen
    yield from (found[parts] for parts in sorted(found))
