"""A cluster's programs as a node's children: what each waits for, how it answers, where its log is."""

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import msgspec

from nixlet.cluster import flannel as flannel_model
from nixlet.cluster import kubeconfigs, programs
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import supervisor, unixsocket
from nixlet.kubeclient.endpoint import Endpoint
from nixlet.node.children import containerd_child
from nixlet.node.cluster.children import answers, preparing
from nixlet.node.cluster.controlplane import datastore
from nixlet.node.cluster.network import flannel
from nixlet.node.cluster.preflight import finding, ports
from nixlet.node.settings import kubeletfiles

API_SERVER, CONTROLLERS, SCHEDULER = "kube-apiserver", "kube-controller-manager", "kube-scheduler"
KUBELET, PROXY, FLANNEL = "kubelet", "kube-proxy", finding.FLANNEL

_LOOPBACK = "127.0.0.1"

#: Seconds that each gets to answer: the API server reads all of the datastore before it does, the proxy waits for its node.
_READY_TIMEOUT = 120.0

#: They are ready within seconds, and others on the machine may be what they fail for: each is tried again before long, for ever.
_RESTART = supervisor.RestartPolicy(stable_after=10.0, pause=15.0, longest_pause=120.0)

#: Without its state a cluster does nothing, and a disk that was full may have room at any time.
_RESTART_STATE = supervisor.RestartPolicy(stable_after=10.0, pause=15.0, longest_pause=15.0)

#: Seconds between SIGTERM and SIGKILL: the API server lets requests end, the datastore writes down what it has.
_GRACE = {API_SERVER: 20.0, finding.ETCD: 20.0, finding.KINE: 20.0}


class Described:
    """Describes the children of a cluster.

    Args:
        found: The programs.
        cluster: The cluster.
    """

    def __init__(self, found: finding.Found, cluster: ClusterSettings) -> None:
        self._found, self._cluster = found, cluster
        self._env = _environment(os.environ, cluster)

    def of_server(self, *, hidden: bool = False) -> list[supervisor.Program]:
        """Datastore, API server, controllers, scheduler.

        Args:
            hidden: kine takes its database's address from the environment, which only its user can read.
        """
        cluster, store = self._cluster, self._found.datastore
        of_state: dict[str, Any] = {"restart": _RESTART_STATE}
        if not cluster.datastore_is_elsewhere:
            # (which disk is full elsewhere, who keeps the database there knows)
            of_state["cause"] = functools.partial(datastore.cause, cluster.layout.database, kine=store == finding.KINE)
        found = []
        if store == finding.ETCD:
            well = self._well(store, "/health")
            etcd = self._program(store, programs.etcd(cluster), well)
            found.append(msgspec.structs.replace(etcd, env=_unshadowed(etcd.env, etcd.argv), **of_state))
        elif store == finding.KINE:
            kine = self._program(store, programs.kine(cluster, hidden=hidden), _served(cluster.layout.kine_socket))
            secret = {"KINE_ENDPOINT": programs.kine_endpoint(cluster)} if hidden else {}

            def may_start(kine: supervisor.Program = kine) -> None:
                kine.may_start()
                if not cluster.datastore_is_elsewhere:
                    datastore.check_room_for_kine(cluster.layout.database)

            found.append(msgspec.structs.replace(kine, env={**kine.env, **secret}, may_start=may_start, **of_state))
        well = answers.until_well(Endpoint.of_kubeconfig(kubeconfigs.administrator(cluster)), "/readyz")
        waits = (store,) if store else ()
        found.append(self._program(API_SERVER, programs.kube_apiserver(cluster), well, waits))
        for name, arguments in ((CONTROLLERS, programs.kube_controller_manager), (SCHEDULER, programs.kube_scheduler)):
            if name in self._found.programs:
                well = self._well(name, "/healthz")
                found.append(self._program(name, arguments(cluster), well, (API_SERVER,)))
        return found

    def of_agent(self, node: programs.Node, others: Iterable[str]) -> list[supervisor.Program]:
        """kubelet and proxy.

        Args:
            node: The node.
            others: The children that there are already.
        """
        cluster, there = self._cluster, set(others)
        found = []
        if KUBELET in self._found.programs:
            well = self._well(KUBELET, "/healthz")
            argv = programs.kubelet(cluster, node, kubeletfiles.directory(self._cluster.layout))
            waits = tuple(name for name in (containerd_child.NAME, API_SERVER) if name in there)
            found.append(self._program(KUBELET, argv, well, waits))
        if PROXY in self._found.programs:
            well = self._well(PROXY, "/healthz")
            waits = tuple(name for name in (API_SERVER,) if name in there)
            found.append(self._program(PROXY, programs.kube_proxy(cluster), well, waits))
        return found

    def of_flannel(self, arguments: list[str], others: Iterable[str]) -> supervisor.Program:
        """flannel.

        Args:
            arguments: As ``flannel.prepare`` has them.
            others: The children that there are already.
        """
        healthy = self._well(FLANNEL, "/healthz")

        async def ready() -> None:
            # It is healthy as soon as it has heard of the cluster; that pods' packets get anywhere is said by this.
            await healthy()
            while not flannel_model.mtu(flannel.subnet_file(self._cluster.layout)):
                await asyncio.sleep(0.05)

        made = self._program(FLANNEL, arguments, ready, tuple(name for name in (API_SERVER,) if name in set(others)))

        def may_start() -> None:
            made.may_start()
            flannel.started_anew(self._cluster.layout)

        # Its flags may be said by variables, too, and these would be somebody else's.
        environment = {name: value for name, value in self._env.items() if not name.startswith("FLANNELD_")}
        environment["NODE_NAME"] = self._cluster.node_name
        return msgspec.structs.replace(made, env=environment, may_start=may_start)

    def _well(self, name: str, path: str) -> Callable[[], Awaitable[None]]:
        """The answer of a program on this machine, with a certificate that nobody knows where it has one."""
        url = ports.asked(self._cluster, name)
        return answers.until_well(Endpoint.of(url, what=name, verified=not url.startswith("https:")), path)

    def _program(
        self, name: str, arguments: list[str], ready: Callable[[], Awaitable[object]], waits_for: tuple[str, ...] = ()
    ) -> supervisor.Program:
        return supervisor.Program(
            name=name,
            argv=[self._found.programs[name], *arguments],
            env=self._env,
            log_path=os.path.join(preparing.logs_dir(self._cluster.layout), f"{name}.log"),
            ready=ready,
            ready_timeout=_READY_TIMEOUT,
            waits_for=waits_for,
            # A stranger at its port would answer in its place.
            may_start=functools.partial(ports.check, list(ports.wanted(self._cluster, [name]))),
            # Pods go on without any of them: a node that was ready once doesn't end for it.
            essential=False,
            restart=_RESTART,
            grace=_GRACE.get(name, 10.0),
        )


def _served(socket: str) -> Callable[[], Awaitable[None]]:
    async def served() -> None:
        while not unixsocket.is_served(socket):
            await asyncio.sleep(0.05)

    return served


def _unshadowed(environment: Mapping[str, str], argv: Iterable[str]) -> dict[str, str]:
    """An environment for etcd, which doesn't start where a variable says what an argument says, and with a file of settings passes over arguments."""
    said = {argument.removeprefix("--").partition("=")[0].upper().replace("-", "_") for argument in argv}
    shadowed = {"ETCD_CONFIG_FILE", *(f"ETCD_{name}" for name in said)}
    return {name: value for name, value in environment.items() if name not in shadowed}


def _environment(node: Mapping[str, str], cluster: ClusterSettings) -> dict[str, str]:
    """The environment of a cluster's programs in that of a node."""
    environment = {name: value for name, value in node.items() if not name.startswith("CONTAINERD_")}
    # Ours: systemd waits for the node's word, not for theirs.
    for name in ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"):
        environment.pop(name, None)
    # The kubelet calls mount, the proxy nft or iptables.
    environment["PATH"] = os.pathsep.join([environment.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    # What is within the cluster is reached without a proxy, whatever there is for the world outside.
    if any(name.lower() in {"http_proxy", "https_proxy"} for name in environment):
        inside = [
            *map(str, (*cluster.node_ips, *cluster.cluster_cidrs, *cluster.service_cidrs)),
            ".svc",
            f".{cluster.cluster_domain}",
        ]
        for name in ("NO_PROXY", "no_proxy"):
            environment[name] = ",".join(filter(None, [environment.get(name, ""), _LOOPBACK, *inside]))
    return environment
