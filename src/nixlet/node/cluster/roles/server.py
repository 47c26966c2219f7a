"""A server: a cluster's control plane, and a node of it; its programs are started beside containerd."""

import asyncio
import contextlib
import logging

from nixlet.cluster import flannel as flannel_model
from nixlet.cluster import kubeconfigs
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import children as host_children
from nixlet.host import uncut, waits
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.kubeclient.client import Client
from nixlet.kubeclient.endpoint import Endpoint
from nixlet.node.cluster.children import described, preparing
from nixlet.node.cluster.controlplane import bootstrap, datastore, deploying, nodenames, record
from nixlet.node.cluster.preflight import finding, made, versions
from nixlet.node.cluster.roles import member
from nixlet.node.images import coredns
from nixlet.node.manifests import deployer as deployers
from nixlet.node.settings import config as node_config
from nixlet.services import joining, joinserver

_log = logging.getLogger("nixlet.cluster")


class Server(member.Member):
    """A cluster that a node is; ``of`` makes it."""

    def __init__(self, settings: node_config.Settings, found: finding.Found, cluster: ClusterSettings) -> None:
        """As ``node.Node``."""
        super().__init__(settings, found, cluster)
        self._administrator = kubeconfigs.administrator(cluster)

    async def _have_credentials(self) -> None:
        making = asyncio.to_thread(preparing.prepare_server, self.settings, self._cluster)
        await uncut.to_its_end(making)

    async def _start_first(self, stack: contextlib.AsyncExitStack, children: host_children.Children) -> None:
        # Before the API server answers: a node that comes meanwhile sees whose cluster it is, and comes again.
        asked = stack.enter_context(Client(Endpoint.of_kubeconfig(self._administrator)))
        keeper = joining.Doorkeeper(self._cluster, asked, flannel_backend=self._backend)
        await stack.enter_async_context(joinserver.serve(keeper, self._cluster))
        programs = self._described.of_server(hidden=await self._hidden())
        if self._cluster.datastore_is_elsewhere:
            if self._found.datastore == finding.KINE:
                self._start(children, [programs.pop(0)])
                await children.ready(finding.KINE)
            # An API server writes to its datastore before it has answered anybody.
            known = await asyncio.to_thread(made.remembered, self._layout)
            recorded = known is not None and known.recorded
            await record.check(self._cluster, known=made.memory(self._layout) if recorded else "")
        self._start(children, programs)
        if self._found.datastore == finding.KINE and not self._cluster.datastore_is_elsewhere:
            ending = datastore.end_without_room(self._layout.database, children[finding.KINE])
            waits.owned(stack, ending, "room for kine")
        if self._found.datastore == finding.ETCD:
            # (one that has raised an alarm isn't well, and no API server would start)
            relief = datastore.Relief(datastore.etcd_of(self._cluster))
            waits.owned(stack, relief.keep(), "relief of etcd")
            self.remarks["etcd's database"] = relief.remark

    async def _hidden(self) -> bool:
        """Whether the address of a database, which may have a password in it, is kept out of kine's command line."""
        kine = self._found.programs.get(finding.KINE)
        if kine is None or not self._cluster.datastore_endpoint:
            return False
        hidden = await versions.takes_variable(kine, "KINE_ENDPOINT")
        if not hidden:
            _log.warning(
                "the datastore-endpoint stands in kine's command line, which all users of this machine can read",
                extra={
                    "hint": "install a later kine; or have the database know the node by a certificate: datastore-certfile"
                },
            )
        return hidden

    async def _settle(self, stack: contextlib.AsyncExitStack, children: host_children.Children) -> None:
        await children.ready(described.API_SERVER)
        await asyncio.to_thread(made.remember, self.settings, self._found.datastore, self._cluster)
        client = await stack.enter_async_context(AsyncClient.of_kubeconfig(self._administrator))
        self._keep_certificates(stack, self._renew)
        if deploying.has_dns(self.settings):
            waits.owned(stack, nodenames.keep(client), "names of nodes")
        applying = bootstrap.apply(client, flannel=self._backend != flannel_model.NONE)
        await self._have_pods(stack, children, client, waits.owned(stack, applying, "bootstrap"))

    async def _renew(self) -> None:
        """Have the node's certificates made anew, those whose time it is.

        Raises:
            NixletError: They can't be.
        """
        await uncut.to_its_end(asyncio.to_thread(preparing.renew, self.settings, self._cluster))

    async def deploy(self, stack: contextlib.AsyncExitStack, maker: coredns.Maker | None) -> None:
        """As ``node.Node.deploy``."""
        deployer = deploying.deployer(self.settings, self._cluster, maker)
        await stack.enter_async_context(deployers.deploying(deployer))
        self.remarks["manifests"] = deployer.remark


async def of(settings: node_config.Settings, found: finding.Found) -> Server:
    """The cluster that a node is.

    Raises:
        NixletError: The settings make no cluster, or the machine lacks something.
    """
    cluster = await member.cluster_settings(settings, found)
    if not (settings.flannel_backend or settings.disable_agent or found.flannel != flannel_model.NONE):
        _log.info(
            "%s is not there: pods of this cluster's nodes can't reach each other from node to node", finding.FLANNEL
        )
    return Server(settings, found, cluster)
