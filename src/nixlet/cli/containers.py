"""``nixlet ps``, ``stop``, ``rm``: containers that are there."""

from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nixlet.cli.node import Node
    from nixlet.rpc.gen import cri_pb2


@grammar.verb(
    options.STATE_DIR,
    options.OUTPUT,
    grammar.Flag("--all", "-a", name="everything", text="Also those that have ended."),
    grammar.Flag("--quiet", "-q", text="Only their IDs."),
)
@options.asynchronous
async def ps(state_dir: str, output: str, *, everything: bool, quiet: bool) -> None:
    """List containers."""
    import datetime

    from nixlet.cli import node, table
    from nixlet.pods import criconfig
    from nixlet.rpc.gen import cri_pb2

    async with node.connected(state_dir) as connection:
        found = [
            container
            for container in [
                *await connection.runtime.containers(),
                *(await bare_pods(connection) if everything else ()),
            ]
            if everything or container.state == cri_pb2.CONTAINER_RUNNING
        ]
    rows, listed = [], []
    for container in sorted(found, key=lambda each: each.created_at, reverse=True):
        state = cri_pb2.ContainerState.Name(container.state).removeprefix("CONTAINER_").lower()
        if container.id == container.pod_sandbox_id:
            state = "no container"
        created = datetime.datetime.fromtimestamp(container.created_at / 1e9, tz=datetime.UTC)
        image = container.image.user_specified_image or container.image.image
        pod = container.labels.get(criconfig.POD_NAME, "")
        listed.append(
            {
                "id": container.id,
                "name": container.metadata.name,
                "pod": pod,
                "namespace": container.labels.get(criconfig.POD_NAMESPACE, ""),
                "image": image,
                "state": state,
                "created": created.isoformat(),
            }
        )
        local = f"{created.astimezone():%Y-%m-%d %H:%M:%S}"
        rows.append((container.id[:12], _short(image), state, local, container.metadata.name, pod))
    if quiet:
        for each in listed:
            print(each["id"])
    elif output == "json":
        options.print_json(listed)
    else:
        table.echo(("CONTAINER ID", "IMAGE", "STATUS", "CREATED", "NAME", "POD"), rows)


def moment(nanoseconds: int) -> str | None:
    """A moment as CRI counts it, RFC 3339; None for one that has not come."""
    import datetime

    return datetime.datetime.fromtimestamp(nanoseconds / 1e9, tz=datetime.UTC).isoformat() if nanoseconds else None


def _short(image: str) -> str:
    """An image's reference without the hash of its store path."""
    head, slash, name = image.rpartition("/")
    if head.startswith("nix:0/") and len(name) > 33 and name[32] == "-":
        return f"nix:0…{slash}{name[:6]}…{name[32:]}"
    return image


async def find(connection: "Node", wanted: str) -> "cri_pb2.Container":
    """A container of a node, as ``lookup.find`` finds it.

    Raises:
        NotFoundError: There is none.
        InvalidArgumentError: There are several.
    """
    from nixlet.pods import lookup

    return lookup.find(wanted, await connection.runtime.containers())


async def bare_pods(connection: "Node") -> "list[cri_pb2.Container]":
    """Our pods that have no container (yet, or any more): each as a container without a name whose ID is the pod's."""
    from nixlet.pods import criconfig
    from nixlet.rpc.gen import cri_pb2

    # In this order: what is made meanwhile has its containers.
    sandboxes = await connection.runtime.sandboxes(criconfig.MADE_BY)
    filled = {each.pod_sandbox_id for each in await connection.runtime.containers()}
    return [
        cri_pb2.Container(
            id=each.id,
            pod_sandbox_id=each.id,
            metadata=cri_pb2.ContainerMetadata(),
            created_at=each.created_at,
            labels=each.labels,
        )
        for each in sandboxes
        if each.id not in filled
    ]


async def find_with_pods(connection: "Node", wanted: str) -> "cri_pb2.Container":
    """A container, or a pod that has none, as ``bare_pods`` has it.

    Raises:
        NotFoundError: There is none.
        InvalidArgumentError: There are several.
    """
    from nixlet.pods import lookup

    return lookup.find(wanted, [*await connection.runtime.containers(), *await bare_pods(connection)])


async def details(connection: "Node", container: str) -> "tuple[cri_pb2.ContainerStatus, dict[str, Any]]":
    """What CRI knows of a container, and what containerd has to add: its process, configuration and specification."""
    import json

    status, texts = await connection.runtime.container_details(container)
    return status, json.loads(texts.get("info", "{}"))


@grammar.verb(
    options.STATE_DIR,
    grammar.Number(
        "--time", "-t", name="grace", default_text="as its pod says, or 10", text="Seconds until it is killed."
    ),
    grammar.Argument("containers", several=True, completes="containers"),
)
@options.asynchronous
async def stop(containers: tuple[str, ...], state_dir: str, grace: int | None) -> None:
    """Stop containers, and the network of pods that have none running any more."""
    import contextlib

    from nixlet import errors
    from nixlet.cli import node

    async with node.connected(state_dir) as connection:
        for wanted in containers:
            found = await find_with_pods(connection, wanted)
            # One that is removed as soon as it ends ("run --rm") may be gone already.
            with contextlib.suppress(errors.NotFoundError):
                container = "" if found.id == found.pod_sandbox_id else found.id
                await connection.stop_pod(found.pod_sandbox_id, container, grace=-1 if grace is None else max(grace, 0))
            print(wanted)


@grammar.verb(
    options.STATE_DIR,
    grammar.Flag("--force", "-f", text="Also when it is running."),
    grammar.Argument("containers", several=True, completes="containers"),
)
@options.asynchronous
async def rm(containers: tuple[str, ...], state_dir: str, *, force: bool) -> None:
    """Remove containers, and pods that have none any more."""
    import contextlib

    from nixlet import errors
    from nixlet.cli import node
    from nixlet.rpc.gen import cri_pb2

    async with node.connected(state_dir) as connection:
        for wanted in containers:
            found = await find_with_pods(connection, wanted)
            if found.state == cri_pb2.CONTAINER_RUNNING and not force:
                raise errors.FailedPreconditionError(
                    f"container {wanted} is running", hint="stop it first, or remove it with --force"
                )
            others = [
                each
                for each in await connection.runtime.containers(sandbox=found.pod_sandbox_id)
                if each.id != found.id
            ]
            # One that is removed as soon as it ends ("run --rm") may be gone already.
            with contextlib.suppress(errors.NotFoundError):
                if others:
                    await connection.runtime.remove_container(found.id)
                else:
                    await connection.remove_pod(found.pod_sandbox_id)
            print(wanted)
