"""A node of a cluster whose server is elsewhere: it joins at each start, and then runs what a server's own node runs beside containerd.

It joins again when its certificates end; what it has keeps its programs going meanwhile.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import logging
from collections.abc import Awaitable, Callable

import msgspec

from nixlet import errors
from nixlet.cluster import flannel as flannel_model
from nixlet.cluster import kubeconfigs, tokens, validation
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import children as host_children
from nixlet.host import supervisor
from nixlet.kubeclient import asynchronous, discovery, joinforms, joining, membership
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.kubeclient.calls import Call
from nixlet.node.cluster.children import described
from nixlet.node.cluster.preflight import finding, mapping
from nixlet.node.cluster.roles import guest, member, waiting
from nixlet.node.settings import config as node_config

#: Seconds after which it is asked whether the server is away.
_PATIENCE = 5.0

#: How often whoever hangs up where nodes join is asked again before it is taken for somebody else.
_TRIES = 8

_log = logging.getLogger("nixlet.cluster")


class Agent(member.Member):
    """A node that joins a cluster; ``of`` makes it."""

    starts = "Kubernetes' agents"

    def __init__(
        self,
        settings: node_config.Settings,
        found: finding.Found,
        cluster: ClusterSettings,
        server: str,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """As ``node.Node``; the server's URL, and what learns what is waited for, in a line."""
        super().__init__(settings, found, cluster)
        self._server, self._tell = server, tell
        places = cluster.layout
        # A kubelet may see its own node, and the network that it is given.
        self._kubelet = kubeconfigs.of_node(places, server)[places.node("kubelet.kubeconfig")]

    async def _have_credentials(self) -> None:
        """Join the cluster; a server that isn't up yet is waited for.

        Raises:
            NixletError: It isn't let in, or what answers is no server of nixlet's.
        """
        facts = await self._join()
        self._cluster = membership.with_facts(self._cluster, facts)
        validation.check(self._cluster)
        self._backend = self._cluster_s_backend(facts)

    def _cluster_s_backend(self, facts: joinforms.ClusterFacts) -> str:
        """How pods' packets get to other nodes: as the cluster says, so that nodes understand each other.

        Raises:
            UnavailableError: By flannel, and there is none.
        """
        own, backend = self.settings.flannel_backend, facts.flannel_backend
        if self.settings.container_runtime_endpoint:
            return flannel_model.NONE
        if own not in {"", backend}:
            _log.warning("flannel-backend %s is passed over: the cluster's is %s", own, backend)
        if backend != flannel_model.NONE and described.FLANNEL not in self._found.programs:
            raise finding.missing_flannel(f"pods of this cluster's nodes reach each other by flannel ({backend})")
        return backend

    async def _join(self) -> joinforms.ClusterFacts:
        """Join; or what is known from before, while the server is away, or what it sends can't be written down."""
        cluster, patience = self._cluster, waiting.Patience("the node waits for its server", self._tell)
        while True:
            try:
                return await self._asked()
            except (errors.UnavailableError, errors.DeadlineExceededError, errors.ResourceExhaustedError) as error:
                now = datetime.datetime.now(datetime.UTC)
                known = membership.remembered(cluster.layout, self._server, cluster.node_name, now)
                if known is not None:
                    _log.warning("the node starts with what it has from before: %s", error, extra={"hint": error.hint})
                    return known
                # (a full disk can't be waited for by somebody who has nothing yet)
                if isinstance(error, joining.NotOursError | errors.ResourceExhaustedError):
                    raise
                await patience.pause(error)

    async def _asked(self) -> joinforms.ClusterFacts:
        cluster = self._cluster
        # (the file may have another one than when the node started)
        token = tokens.parse(mapping.given_tokens(self.settings)[0])

        def join(call: Call) -> joinforms.ClusterFacts:
            return joining.join(cluster.layout, self._server, token, cluster.node_name, cluster.node_ips, call=call)

        return await asynchronous.in_thread(join)

    def _as_child(self, program: supervisor.Program) -> supervisor.Program:
        """The proxy and flannel are well only when they have heard of the server once: while it is away they aren't waited for."""
        if program.name not in {described.PROXY, described.FLANNEL}:
            return program
        return msgspec.structs.replace(program, ready=self._answered_or_alone(program.name, program.ready))

    def _answered_or_alone(self, name: str, ready: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
        """An answer that isn't waited for while the server is away: the node's pods go on meanwhile."""

        async def answered() -> None:
            waiting = asyncio.ensure_future(ready())
            try:
                async with AsyncClient.of_kubeconfig(self._kubelet) as client:
                    while not (await asyncio.wait({waiting}, timeout=_PATIENCE))[0]:
                        try:
                            await client.check("/livez")
                        except (errors.UnavailableError, errors.DeadlineExceededError) as error:
                            _log.warning("%s isn't waited for: %s", name, error)
                            return
                    await waiting
            finally:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

        return answered

    async def _settle(self, stack: contextlib.AsyncExitStack, children: host_children.Children) -> None:
        self._keep_certificates(stack, self._asked)
        client = await stack.enter_async_context(AsyncClient.of_kubeconfig(self._kubelet))
        await self._have_pods(stack, children, client)


async def of(
    settings: node_config.Settings, found: finding.Found, tell: Callable[[str], None] = lambda _: None
) -> member.Member:
    """The node that joins a cluster.

    Args:
        settings: The node's.
        found: The programs.
        tell: Learns what is waited for, in a line.

    Raises:
        InvalidArgumentError: The server's URL is none; or the settings make no node.
        UsageError: There is no token, or nothing would run.
        NixletError: The machine lacks something.
    """
    if settings.disable_agent:
        raise errors.UsageError("--disable-agent leaves nothing of an agent", hint="leave it out")
    if settings.kubeconfig:
        cluster = await member.cluster_settings(settings, found)
        way = settings.kubeconfig
        return guest.Guest(settings, found, cluster, way, lambda _: guest.read(way), tell)
    server = joining.server_url(settings.server)
    if not any(mapping.given_tokens(settings)[:1]):
        raise errors.UsageError(
            "a node joins a cluster by a token, and there is none",
            hint="--token or --token-file; on the server it is in DATA_DIR/server/node-token",
        )
    cluster = await member.cluster_settings(settings, found)
    token = tokens.parse(mapping.given_tokens(settings)[0])
    if token.bootstrap and await _is_anybody_s(cluster, server, tell):
        alone = dataclasses.replace(
            found, programs={name: path for name, path in found.programs.items() if name != described.PROXY}
        )
        return guest.Guest(
            settings, alone, cluster, server, lambda call: discovery.discover(server, token, call=call), tell
        )
    return Agent(settings, found, cluster, server, tell)


async def _is_anybody_s(cluster: ClusterSettings, server: str, tell: Callable[[str], None]) -> bool:
    """Whether a cluster is one where nodes don't join as nixlet's do; until somebody answers there it is waited for."""
    now, places = datetime.datetime.now(datetime.UTC), cluster.layout
    if membership.remembered(places, server, cluster.node_name, now) is not None:
        return False
    if guest.is_one(places, server):
        return True
    patience, tries = waiting.Patience("the node waits for its server", tell), 0
    while True:
        try:
            if await asynchronous.in_thread(lambda call: joining.is_ours(server, call=call)):
                return False
        except errors.UnavailableError as error:
            tries += 1
            if tries < _TRIES:
                await patience.pause(error)
                continue
        try:
            await asynchronous.in_thread(lambda call: joining.check_answers(server, call=call))
        except (errors.UnavailableError, errors.DeadlineExceededError) as error:
            await patience.pause(error)
        except errors.NixletError:
            return True
        else:
            return True
