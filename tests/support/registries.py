"""Real registries for tests: Debian's docker-registry on a port of this machine."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import nodes

#: "secret" as htpasswd's bcrypt has it; the registry takes nothing else.
_SECRET = "$2b$05$rmSlqstP0hcnq3FAJ4m.SebBKckplucS9GJgqAF8BDBNlrHIl6eRy"

USER, PASSWORD = "ada", "secret"

_REQUEST = re.compile(r'"(?:GET|HEAD) (/v2/[^" ]*)')


class Registry:
    """A registry that runs.

    Attributes:
        address: Its host and port.
    """

    def __init__(self, address: str, log: Path, process: "subprocess.Popen[bytes]") -> None:
        self.address = address
        self._process = process
        self._log = log
        self._seen = 0

    def requests(self) -> list[str]:
        """The paths that were asked for since this was asked last."""
        found = _REQUEST.findall(self._log.read_text(errors="replace"))
        new, self._seen = found[self._seen :], len(found)
        return new

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let it answer nobody for the time of the context: who asks waits."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def is_being_asked(self) -> bool:
        """Whether somebody has a connection to it, by IPv4 (proc_pid_net(5))."""
        port, established = int(self.address.rpartition(":")[2]), "01"
        rows = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return any(remote.endswith(f":{port:04X}") and state == established for _, remote, state in rows)

    def push(self, archive: Path, name: str, *options: str) -> None:
        """Put an OCI archive's image there."""
        argv = ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false", *options]
        done = subprocess.run(
            [*argv, f"oci-archive:{archive}", f"docker://{self.address}/{name}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.requests()


@contextlib.contextmanager
def running(
    directory: Path,
    port: int,
    *,
    login: bool = False,
    tls: dict[str, Any] | None = None,
    host: str = "127.0.0.1",
    listens: str = "127.0.0.1",
) -> Iterator[Registry]:
    """A registry for the time of the context.

    Args:
        directory: Where its files are.
        port: Its port.
        login: Whether it wants USER and PASSWORD.
        tls: Its ``http.tls``: certificate, key, clientcas.
        host: What it is called.
        listens: Its address; empty: all that the machine has.
    """
    directory.mkdir(parents=True, exist_ok=True)
    http: dict[str, Any] = {"addr": f"{listens}:{port}", "secret": "x"}
    if tls:
        http["tls"] = tls
    config: dict[str, Any] = {
        "version": 0.1,
        "http": http,
        "storage": {"filesystem": {"rootdirectory": str(directory / "content")}},
        "log": {"accesslog": {"disabled": False}},
    }
    if login:
        (directory / "htpasswd").write_text(f"{USER}:{_SECRET}\n")
        config["auth"] = {"htpasswd": {"realm": "tests", "path": str(directory / "htpasswd")}}
    (directory / "registry.yml").write_text(json.dumps(config))
    log = directory / "registry.log"
    argv = ["docker-registry", "serve", str(directory / "registry.yml")]
    with log.open("w") as file, subprocess.Popen(argv, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + 30
            while process.poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            assert process.poll() is None, log.read_text()
            yield Registry(f"{host}:{port}", log, process)
        finally:
            process.terminate()


def say(node: nodes.Node, text: dict[str, Any] | str) -> None:
    """Write a node's registries.yaml, and wait until it has read that."""
    before = node.log.read_text().count("registries are reached")
    node.registries.write_text(text if isinstance(text, str) else json.dumps(text or {"mirrors": {}}))
    deadline = time.monotonic() + 30
    while node.log.read_text().count("registries are reached") == before:
        assert time.monotonic() < deadline, node.log.read_text()
        time.sleep(0.05)


class Authority:
    """A CA of our own.

    Attributes:
        certificate: Its certificate.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.certificate = directory / "ca.crt"
        self._key = directory / "ca.key"
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
            *("-subj", "/CN=tests", "-keyout", str(self._key), "-out", str(self.certificate)),
        )

    def issue(self, name: str) -> tuple[Path, Path]:
        """A certificate for the loopback address, and its key."""
        key, request, certificate = (self._directory / f"{name}.{end}" for end in ("key", "csr", "crt"))
        extensions = self._directory / f"{name}.ext"
        extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        _openssl(
            *("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", str(key), "-out", str(request)),
        )
        _openssl(
            *("x509", "-req", "-days", "2", "-CAcreateserial", "-CA", str(self.certificate), "-CAkey", str(self._key)),
            *("-in", str(request), "-extfile", str(extensions), "-out", str(certificate)),
        )
        return certificate, key


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
