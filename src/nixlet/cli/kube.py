"""``nixlet kube``: pods from Kubernetes manifests."""

import sys

from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nixlet.cli.node import Node
    from nixlet.containers import model
    from nixlet.pods.player import RunningContainer, RunningPod


def _read(file: str) -> "tuple[list[model.Pod], list[str]]":
    from nixlet import errors
    from nixlet.kube import manifest

    if file == "-":
        return manifest.parse(sys.stdin.buffer.read(), "standard input")
    try:
        with open(file, "rb") as stream:
            return manifest.parse(stream.read(), file)
    except OSError as error:
        raise errors.UsageError(f"the manifest {file} can't be read: {error.strerror}") from error


@grammar.verb(
    options.STATE_DIR,
    options.OUTPUT,
    grammar.Flag("--replace", text="Remove pods of the same names first."),
    grammar.Flag("--wait", "-w", text="Print the containers' output, wait for their end, remove the pods."),
    grammar.Flag("--summary", text="With --wait: say what it took."),
    grammar.Argument("file"),
)
@options.asynchronous
async def play(file: str, state_dir: str, output: str, *, replace: bool, wait: bool, summary: bool) -> int:
    """Run the pods of a manifest FILE (- for standard input), each once.

    With --wait the exit status is that of the first container that fails.
    """
    from nixlet.cli import node, terminal
    from nixlet.kube import manifest
    from nixlet.pods import player

    pods, notices = _read(file)
    for notice in [*notices, *manifest.restart_notices(pods)]:
        print(f"notice: {notice}", file=sys.stderr)
    status = 0
    played: list[RunningPod] = []
    try:
        async with node.connected(state_dir) as connection:
            with terminal.ended_by_sigterm():
                for pod in pods:
                    if replace:
                        for old in await player.find(connection.runtime, pod.name, pod.namespace):
                            await connection.remove_pod(old.id, grace=-1)
                    if wait:
                        status = await _run_to_end(connection, pod, summary=summary) or status
                        continue
                    async with connection.played(pod) as started:
                        played.append(started.running)
                        if output != "json":
                            print(f"pod/{pod.name}")
    finally:
        # Those that run are told also when a later one doesn't.
        if output == "json":
            options.print_json([_described(running) for running in played])
    return status


def _described(running: "RunningPod") -> "dict[str, Any]":
    containers = [{"name": container.name, "id": container.id} for container in running.containers]
    return {
        "name": running.pod.name,
        "namespace": running.pod.namespace,
        "id": running.sandbox,
        "containers": containers,
    }


async def _run_to_end(connection: "Node", pod: "model.Pod", *, summary: bool) -> int:
    import asyncio
    import contextlib
    import time

    from nixlet import errors

    start = time.time()
    first_output: list[float] = []
    async with connection.played(pod) as played:
        # Nothing is awaited before this: whoever interrupts us leaves no pod.
        running = played.running
        try:
            prefixes = {each.id: f"{each.name}: " if len(running.containers) > 1 else "" for each in running.containers}

            async def show(container: "RunningContainer") -> int:
                async for record in connection.output(container.id, container.log_path):
                    first_output.append(time.time())
                    options.write_record(record, prefixes[container.id].encode())
                return await connection.wait(container.id) if container.exit_code is None else container.exit_code

            codes = await asyncio.gather(*(show(container) for container in running.containers))
            if summary:
                mounts = [await connection.mounts_of(container.id) for container in running.containers]
                _summarise(connection, pod, mounts, (min(first_output) - start) * 1000 if first_output else None)
        finally:
            with contextlib.suppress(errors.NotFoundError):
                await asyncio.shield(connection.remove_pod(running.sandbox, grace=-1))
    return next((code for code in codes if code), 0)


def _summarise(connection: "Node", pod: "model.Pod", mounts: list[int], milliseconds: float | None) -> None:
    from nixlet.cli import sizes

    print()
    for container, count in zip(pod.containers, mounts, strict=True):
        pulled = connection.pulled.get(container.image)
        print(f"container {container.name}")
        if pulled is not None:
            print(f"  paths in the closure      {pulled.closure_paths}")
            print(f"  bytes fetched             {sizes.decimal(pulled.fetched_bytes)}")
            print(f"  image ready after         {pulled.duration_ms} ms")
        print(f"  mounts per container      {count}")
    if milliseconds is not None:
        print(f"  from start to output      {milliseconds:.0f} ms (pull included)")


@grammar.verb(
    options.STATE_DIR,
    grammar.Flag("--ignore-missing", text="It is no error when a pod isn't there."),
    grammar.Argument("file"),
)
@options.asynchronous
async def down(file: str, state_dir: str, *, ignore_missing: bool) -> None:
    """Remove the pods of a manifest FILE (- for standard input)."""
    from nixlet import errors
    from nixlet.cli import node
    from nixlet.pods import player

    pods, _ = _read(file)
    async with node.connected(state_dir) as connection:
        for pod in pods:
            sandboxes = await player.find(connection.runtime, pod.name, pod.namespace)
            if not sandboxes and not ignore_missing:
                raise errors.NotFoundError(f"there is no pod {pod.name}", hint="see what there is: nixlet ps -a")
            for sandbox in sandboxes:
                await connection.remove_pod(sandbox.id, grace=pod.grace_seconds)
                print(f"pod/{pod.name} removed")


kube = grammar.Group("Run pods from Kubernetes manifests.", {"play": play, "down": down})
