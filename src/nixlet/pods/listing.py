"""The containers that are there, as people see and name them."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence

from nixlet.containerd import cri
from nixlet.pods import criconfig, lookup, removal
from nixlet.rpc.gen import cri_pb2

#: The state of a pod that has no container.
NO_CONTAINER = "no container"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A container, or a pod of ours that has none: without a name, and with the pod's ID.

    Attributes:
        id: Its ID.
        name: Its name in its pod.
        pod: Its pod's name.
        namespace: Its pod's namespace.
        image: The image that it is made from, as who made it called it.
        state: "created", "running", "exited", "unknown", or ``NO_CONTAINER``.
        created: When it was made (RFC 3339).
    """

    id: str
    name: str
    pod: str
    namespace: str
    image: str
    state: str
    created: str


@dataclasses.dataclass(frozen=True, slots=True)
class Present:
    """What was there at a moment.

    Attributes:
        containers: The containers; and our pods that have none (yet, or any more), each as a container without a name whose
            ID is the pod's.
        sandboxes: The pod of each of them, by the pod's ID.
    """

    containers: Sequence[cri_pb2.Container]
    sandboxes: Mapping[str, cri_pb2.PodSandbox]

    def find(self, wanted: str) -> cri_pb2.Container:
        """What a person means; as ``lookup.find``."""
        return lookup.find(wanted, self.containers)


def is_bare(container: cri_pb2.Container) -> bool:
    """Whether it stands for a pod that has no container."""
    return container.id == container.pod_sandbox_id


async def containers(
    runtime: cri.RuntimeClient, removals: removal.Removals, *, running: bool = False
) -> Sequence[cri_pb2.Container]:
    """The containers, or those that run, besides those of pods that people take for gone.

    Raises:
        NixletError: The runtime can't tell.
    """
    gone = set(removals.gone())
    found = await runtime.containers(running=running)
    gone |= set(removals.gone())
    return [each for each in found if each.pod_sandbox_id not in gone]


async def present(runtime: cri.RuntimeClient, removals: removal.Removals) -> Present:
    """What is there.

    Args:
        runtime: The CRI.
        removals: What is being removed there: a pod is as good as gone once it has no container.

    Raises:
        NixletError: The runtime can't tell.
    """
    hidden = set(removals.leaving())
    # In this order: what is made meanwhile has its containers, and is left out.
    sandboxes = {each.id: each for each in await runtime.sandboxes()}
    found = [each for each in await containers(runtime, removals) if each.pod_sandbox_id in sandboxes]
    hidden |= set(removals.leaving())
    filled = {each.pod_sandbox_id for each in found}
    bare = (
        cri_pb2.Container(
            id=each.id,
            pod_sandbox_id=each.id,
            metadata=cri_pb2.ContainerMetadata(),
            created_at=each.created_at,
            labels=each.labels,
        )
        for each in sandboxes.values()
        if each.id not in filled and each.id not in hidden and criconfig.MADE_BY.items() <= dict(each.labels).items()
    )
    return Present([*found, *bare], sandboxes)


async def entries(runtime: cri.RuntimeClient, removals: removal.Removals, *, everything: bool) -> Sequence[Entry]:
    """The containers that run, or all and our pods that have none; the latest first.

    Raises:
        NixletError: The runtime can't tell.
    """
    if everything:
        found = (await present(runtime, removals)).containers
    else:
        found = await containers(runtime, removals, running=True)
    return [_entry(each) for each in sorted(found, key=lambda each: each.created_at, reverse=True)]


def _entry(container: cri_pb2.Container) -> Entry:
    return Entry(
        id=container.id,
        name=container.metadata.name,
        pod=container.labels.get(criconfig.POD_NAME, ""),
        namespace=container.labels.get(criconfig.POD_NAMESPACE, ""),
        image=container.image.user_specified_image or container.image.image,
        state=NO_CONTAINER if is_bare(container) else state_of(container.state),
        created=moment(container.created_at) or "",
    )


def state_of(state: "cri_pb2.ContainerState.ValueType") -> str:
    """CRI's name of a container's state, for people."""
    return cri_pb2.ContainerState.Name(state).removeprefix("CONTAINER_").lower()


def moment(nanoseconds: int) -> str | None:
    """A moment as CRI counts it, RFC 3339; None for one that has not come."""
    return datetime.datetime.fromtimestamp(nanoseconds / 1e9, tz=datetime.UTC).isoformat() if nanoseconds else None
