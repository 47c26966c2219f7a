"""A real etcd and a real API server with a cluster's certificates and arguments, and nothing else."""

import contextlib
import dataclasses
import datetime
import ipaddress
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nixlet import errors
from nixlet.cluster import certificates, kubeconfigs, programs, tokens
from nixlet.cluster.settings import ClusterSettings
from nixlet.kubeclient.client import Client
from nixlet.kubeclient.endpoint import Endpoint
from support import parts

READY_SECONDS = 120

#: Nobody else's, on the loopback interface of the tests' own network.
ADDRESS = "192.0.2.77"


def program(name: str) -> str:
    """A program of Kubernetes'."""
    return str(parts.kubernetes() / name)


def kubeconfig(settings: ClusterSettings) -> str:
    """The administrator's file."""
    return settings.layout.cred("admin.kubeconfig")


def endpoint(settings: ClusterSettings) -> Endpoint:
    """The API server, for its administrator."""
    return Endpoint.of_kubeconfig(kubeconfigs.read(kubeconfig(settings)))


class ControlPlane:
    """Programs that run until the context's end. Their output is in files beside the data."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        data, state = directory / "data", directory / "run"
        plain = ClusterSettings(str(data), str(state), "node-1", (ipaddress.ip_address(ADDRESS),), embedded_etcd=True)
        self.settings = dataclasses.replace(plain, **changes)
        self._directory = directory
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        certificates.ensure(self.settings, datetime.datetime.now(datetime.UTC))
        with open(self.settings.layout.tls("server-ca.crt"), "rb") as file:
            self.token = tokens.keep(self.settings.layout, file.read())
        for path, config in kubeconfigs.of_server(self.settings).items():
            kubeconfigs.write(path, config)
        for path in programs.directories(self.settings):
            os.makedirs(path, mode=0o700, exist_ok=True)

    def start(self, name: str) -> None:
        """Start ``etcd``, ``kube-apiserver`` or ``kube-controller-manager``."""
        match name:
            case "etcd":
                argv = ["etcd", *programs.etcd(self.settings)]
            case "kube-apiserver":
                argv = [program(name), *programs.kube_apiserver(self.settings)]
            case _:
                argv = [program(name), *programs.kube_controller_manager(self.settings)]
        with open(self._directory / f"{name}.log", "ab") as log:
            self._processes[name] = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait(self) -> None:
        """Wait until the API server is ready."""
        end = time.monotonic() + READY_SECONDS
        with Client(endpoint(self.settings)) as client:
            while True:
                try:
                    client.check("/readyz")
                    return
                except errors.NixletError:
                    for name, process in self._processes.items():
                        assert process.poll() is None, f"{name} has ended: {self.log(name)}"
                    if time.monotonic() > end:
                        raise
                time.sleep(0.1)

    def log(self, name: str) -> str:
        """The end of what a program has printed."""
        return (self._directory / f"{name}.log").read_text(errors="replace")[-4000:]

    def stop(self, name: str) -> None:
        """Stop a program."""
        process = self._processes.pop(name)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop_all(self) -> None:
        """Stop all, clients first."""
        for name in reversed(tuple(self._processes)):
            self.stop(name)


@contextlib.contextmanager
def running(directory: Path, *more: str, **changes: Any) -> Iterator[ControlPlane]:
    """etcd and an API server that is ready, and further programs."""
    made = ControlPlane(directory, **changes)
    there = subprocess.run(["ip", "address", "show", "dev", "lo"], check=True, capture_output=True, text=True)
    if ADDRESS not in there.stdout:
        subprocess.run(["ip", "address", "add", f"{ADDRESS}/32", "dev", "lo"], check=True)
    try:
        for name in ("etcd", "kube-apiserver", *more):
            made.start(name)
        made.wait()
        yield made
    finally:
        made.stop_all()
        subprocess.run(["ip", "address", "del", f"{ADDRESS}/32", "dev", "lo"], check=True)
