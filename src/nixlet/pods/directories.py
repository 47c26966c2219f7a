"""Pods' directories: their containers' logs and empty volumes."""

import contextlib
import os
from collections.abc import Collection

from nixlet import errors
from nixlet.containers import model
from nixlet.host import files, mounts
from nixlet.pods import begun, criconfig

#: The directory of a pod's empty volumes, beside its containers' logs; no container can have this name.
_VOLUMES = ".volumes"

#: Beside them, its file of names, and that of its own.
_HOSTS = ".hosts"
_HOSTNAME = ".hostname"


def hosts(directory: str) -> str:
    """Where a pod's file of names is."""
    return os.path.join(directory, _HOSTS)


def hostname(directory: str) -> str:
    """Where the file of a pod's own name is, if the runtime makes none."""
    return os.path.join(directory, _HOSTNAME)


def volumes(pod: model.Pod, directory: str) -> dict[str, str]:
    """Make a pod's volumes; where each is on the host, by its name.

    Raises:
        FailedPreconditionError: A volume of the host is not there, or is something else.
    """
    places = {}
    for volume in pod.volumes:
        if volume.host_path:
            criconfig.check_host_path(volume)
            places[volume.name] = volume.host_path
        else:
            place = os.path.join(directory, _VOLUMES, volume.name)
            # As kubelets do: containers of any user share it.
            files.new_directories(place, 0o777)
            places[volume.name] = place
    return places


def remove(directory: str) -> None:
    """Delete a pod's logs and empty volumes, unless something is mounted in there."""
    mounts.remove_tree(directory, ignore_errors=True)


def sweep(pods_dir: str, containerd: str, uids: Collection[str]) -> None:
    """Delete what is left of pods that another client of the CRI removed.

    Args:
        pods_dir: The directory of the pods' directories.
        containerd: The identity of the containerd that was asked; of another one's pods nothing is known.
        uids: The pods that it has.
    """
    # Those that are not finished have more to give back.
    for directory in begun.finished(pods_dir, containerd):
        if begun.uid_of(directory) not in uids:
            with contextlib.suppress(errors.FailedPreconditionError):
                remove(directory)
