"""A real API server with a real etcd, and nothing else of a cluster: objects are kept, and nobody does anything about them."""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from support import parts

#: The API server takes no loopback address for what others know it by; nobody connects to this one.
_ADVERTISED = "192.0.2.1"

#: Seconds for the two to answer, on a busy machine.
_PATIENCE = 120


def program(name: str) -> str:
    return str(parts.kubernetes() / name)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        bound = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in bound:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in bound]


class ApiServer:
    """An API server, running or not.

    Attributes:
        kubeconfig: Lets one do everything.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kubeconfig = directory / "admin.kubeconfig"
        self._etcd, self._peer, self._port = _free_ports(3)
        (directory / "tokens.csv").write_text('letmein,admin,admin,"system:masters"\n')
        key = ["openssl", "genrsa", "-out", str(directory / "sa.key"), "2048"]
        subprocess.run(key, check=True, capture_output=True)
        cluster = {
            "server": f"https://127.0.0.1:{self._port}",
            "certificate-authority": str(directory / "pki" / "apiserver.crt"),
        }
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "c", "cluster": cluster}],
                    "users": [{"name": "u", "user": {"token": "letmein"}}],
                    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                    "current-context": "x",
                }
            )
        )

    def kubectl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run kubectl for this server."""
        argv = [
            program("kubectl"),
            f"--kubeconfig={self.kubeconfig}",
            f"--cache-dir={self.directory}/cache",
            *arguments,
        ]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done

    def get(self, *what: str) -> Any:
        """An object, or None."""
        out = self.kubectl("get", *what, "--ignore-not-found", "-o", "json").stdout
        return json.loads(out) if out else None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Both, for the time of the context; what they keep stays for the next."""
        with contextlib.ExitStack() as stack:
            urls = f"http://127.0.0.1:{self._etcd}"
            stack.enter_context(
                self._started(
                    ["etcd", f"--data-dir={self.directory}/etcd", f"--listen-client-urls={urls}", f"--advertise-client-urls={urls}",
                     f"--listen-peer-urls=http://127.0.0.1:{self._peer}", "--unsafe-no-fsync"]
                )
            )  # fmt: skip
            key = f"{self.directory}/sa.key"
            stack.enter_context(
                self._started(
                    [program("kube-apiserver"), f"--etcd-servers={urls}", "--service-cluster-ip-range=10.241.0.0/16",
                     "--authorization-mode=Node,RBAC", "--allow-privileged",
                     "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={key}",
                     f"--service-account-signing-key-file={key}", f"--secure-port={self._port}", "--bind-address=127.0.0.1",
                     f"--advertise-address={_ADVERTISED}", f"--cert-dir={self.directory}/pki",
                     f"--token-auth-file={self.directory}/tokens.csv"]
                )
            )  # fmt: skip
            deadline = time.monotonic() + _PATIENCE
            while self.kubectl("get", "--raw", "/readyz", check=False).stdout != "ok" or not self._has_namespaces():
                assert time.monotonic() < deadline, (self.directory / "kube-apiserver.log").read_text()[-4000:]
                time.sleep(0.1)
            yield

    def _has_namespaces(self) -> bool:
        return self.kubectl("get", "namespace", "kube-system", "default", check=False).returncode == 0

    @contextlib.contextmanager
    def _started(self, argv: list[str]) -> Iterator[None]:
        with (
            (self.directory / f"{os.path.basename(argv[0])}.log").open("ab") as log,
            subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL) as child,
        ):
            try:
                yield
            finally:
                child.kill()
