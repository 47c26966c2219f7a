"""Pods whose ports are the machine's although their network is an ordinary user's: rootlesskit leads what arrives there to them."""

import asyncio
import functools
import ipaddress
import logging
from collections.abc import Sequence

from nixlet import errors
from nixlet.containerd import cri
from nixlet.host import rootlesskit
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import cri_pb2

_PROTOCOLS = {cri_pb2.TCP: "tcp", cri_pb2.UDP: "udp"}

_log = logging.getLogger("nixlet.pods")


class Runtime(cri.RuntimeClient):
    """CRI's runtime service, with the machine's ports for the pods that are made and ended through it.

    The ports are known here alone: pods end with an ordinary user's node, and so does rootlesskit.
    """

    def __init__(self, channel: channels.Channel, address: str, api: str) -> None:
        """As ``cri.RuntimeClient``; ``api`` is the socket of rootlesskit's API."""
        super().__init__(channel, address)
        self._api = api
        self._forwarded: dict[str, list[int]] = {}

    async def run_sandbox(self, config: cri_pb2.PodSandboxConfig, runtime: str = "") -> str:
        """Make and start a pod's sandbox, and have its ports lead to it; its ID.

        Raises:
            FailedPreconditionError: A port can't be had; nothing of the pod stays.
            NixletError: As ``cri.RuntimeClient``.
        """
        # In the node's own network nobody asks for them.
        asked = cri_pb2.PodSandboxConfig()
        asked.CopyFrom(config)
        del asked.port_mappings[:]
        sandbox = await super().run_sandbox(asked, runtime)
        try:
            await self._forward(sandbox, config.port_mappings)
        except BaseException:
            await self.stop_sandbox(sandbox)
            await self.remove_sandbox(sandbox)
            raise
        return sandbox

    async def _forward(self, sandbox: str, ports: Sequence[cri_pb2.PortMapping]) -> None:
        if not ports:
            return
        network = (await self.sandbox_status(sandbox)).network
        addresses = [each for each in (network.ip, *(more.ip for more in network.additional_ips)) if each]
        numbers = self._forwarded.setdefault(sandbox, [])
        for port in ports:
            protocol = _PROTOCOLS.get(port.protocol)
            if protocol is None:
                name = cri_pb2.Protocol.Name(port.protocol)
                raise errors.UnsupportedError(
                    f"port {port.host_port}: rootlesskit leads no {name} to pods", hint="use TCP or UDP"
                )
            outside = (port.host_ip or "0.0.0.0", port.host_port)  # noqa: S104 (a person said so)
            inside = (_fitting(addresses, outside[0]), port.container_port)
            add = functools.partial(rootlesskit.add_port, self._api, protocol=protocol, outside=outside, inside=inside)
            try:
                numbers.append(await asyncio.to_thread(add))
            except errors.FailedPreconditionError as error:
                raise errors.FailedPreconditionError(
                    f"port {port.host_port} of the host can't be had: {error.message}", hint="choose another port"
                ) from error

    async def stop_sandbox(self, sandbox: str) -> None:
        """End all of a pod's containers and give its network back, with its ports."""
        await super().stop_sandbox(sandbox)
        await self._close(sandbox)

    async def remove_sandbox(self, sandbox: str) -> None:
        """Remove a pod with its containers, and give its ports back."""
        await super().remove_sandbox(sandbox)
        await self._close(sandbox)

    async def _close(self, sandbox: str) -> None:
        for number in self._forwarded.pop(sandbox, ()):
            try:
                await asyncio.to_thread(rootlesskit.remove_port, self._api, number)
            except errors.NixletError as error:
                _log.warning("a port of pod %s leads nowhere, and stays taken until the node's end: %s", sandbox, error)


def _fitting(addresses: Sequence[str], outside: str) -> str:
    """The address of a pod that is of the same version as one of the machine, or else its first one."""
    version = ipaddress.ip_address(outside).version
    return next((each for each in addresses if ipaddress.ip_address(each).version == version), addresses[0])
