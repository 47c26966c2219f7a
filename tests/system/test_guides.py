"""docs/guides: nixlet beside programs that are not its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import alone, image_archives, kubelets, nodes, parts, storeimages

pytestmark = pytest.mark.slow

PAUSE = "localhost/pause:1"

#: The guide's, but for places: a containerd that was there before, with nixlet's snapshotter in its configuration.
CONFIGURATION = """\
version = 3
root = "{root}/containerd"
state = "{run}/state"

[grpc]
  address = "{run}/containerd.sock"

[ttrpc]
  address = "{run}/containerd.sock.ttrpc"

[plugins."io.containerd.cri.v1.images"]
  snapshotter = "nix"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{pause}"

[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true

[plugins."io.containerd.nri.v1.nri"]
  disable = true

[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"

[proxy_plugins.nix]
  type = "snapshot"
  address = "{socket}"
  [proxy_plugins.nix.exports]
    root = "{snapshots}"
    enable_remote_snapshot_annotations = "true"
"""


class Foreign:
    """A containerd of somebody's with nixlet's snapshotter, as ``kubelets`` has a node."""

    def __init__(self, place: alone.Alone) -> None:
        self.containerd_socket = place.containerd_socket
        self.node_socket = place.socket

    def crictl(self, *arguments: str) -> str:
        argv = [*parts.crictl(self.node_socket, self.containerd_socket), *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout.strip()

    def remove_all_pods(self) -> None:
        self.crictl("rmp", "--all", "--force")


def test_a_kubelet_and_a_containerd_that_were_there_before(
    tmp_path: Path, store_images: dict[int, storeimages.StoreImage], busybox_layer: bytes
) -> None:
    """docs/guides/kubeadm.md: the snapshotter beside them, two lines in the kubelet's configuration, nothing else."""
    with alone.cleaned_up(5, tmp_path) as place, place.serving() as snapshotter:
        assert snapshotter.poll() is None, place.log.read_text()
        file = tmp_path / "containerd.toml"
        file.write_text(
            CONFIGURATION.format(root=tmp_path, run=place.run, pause=PAUSE, socket=place.socket, snapshots=place.root)
        )
        program = parts.containerd("2.4.2")
        with place.started(
            [str(program), "--config", str(file)],
            place.containerd_socket,
            {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
        ):
            for name, command in (
                (PAUSE, ["/bin/sleep", "100000"]),
                ("localhost/ordinary:1", ["/bin/echo", "ordinary"]),
            ):
                archive = tmp_path / "archive.tar"
                files = image_archives.oci([busybox_layer], name=name, config={"Cmd": command, "Env": ["PATH=/bin"]})
                archive.write_bytes(image_archives.tar(files))
                argv = [
                    sys.executable,
                    "-m",
                    "nixlet",
                    "image",
                    "load",
                    "--address",
                    str(place.containerd_socket),
                    str(archive),
                ]
                subprocess.run(argv, check=True, capture_output=True)
            foreign = Foreign(place)
            with kubelets.running(foreign, tmp_path / "kubelet") as kubelet:  # type: ignore[arg-type]  # as far as it asks
                for name, image in (("nix", store_images[50].reference), ("ordinary", "localhost/ordinary:1")):
                    pod = kubelet.play(nodes.manifest(name, image, command=["/bin/echo", name], hostNetwork=True))
                    assert kubelet.until_ended(pod, foreign) == f"{name}\n"  # type: ignore[arg-type]  # as above
