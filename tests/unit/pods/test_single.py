"""A container by itself as a pod of one: what of it can't be had together, and what stands for what."""

from typing import Any

import pytest

from nixlet import errors
from nixlet.containers import model
from nixlet.pods import single


def wanted(**values: Any) -> single.Wanted:
    return single.Wanted(directory="/home", image="busybox:1", **values)


def container(**values: object) -> model.Container:
    (made,) = single.pod(wanted(**values), attached=True).containers
    return made


def test_what_nobody_says() -> None:
    pod = single.pod(wanted(), attached=True)
    assert (pod.name, pod.restart_policy, pod.host_network, pod.no_network, pod.remove_when_ended) == (
        pod.containers[0].name,
        "Never",
        False,
        False,
        False,
    )
    assert pod.name.startswith("run-")
    assert pod.name != single.pod(wanted(), attached=True).name
    (made,) = pod.containers
    assert (made.image, made.pull_policy, made.command, made.args) == ("busybox:1", "IfNotPresent", (), ())
    assert (made.stdin, made.stdin_once, made.tty) == (False, False, False)


@pytest.mark.parametrize(
    ("entrypoint", "command", "program", "args"),
    [
        (None, ("a", "b"), (), ("a", "b")),
        ("/x", ("a", "b"), ("/x",), ("a", "b")),
        ("/x", (), ("/x",), ()),
        ("", ("a", "b"), ("a",), ("b",)),
        ("/$x", ("$(A)",), ("/$$x",), ("$$(A)",)),
    ],
)
def test_the_program(
    entrypoint: str | None, command: tuple[str, ...], program: tuple[str, ...], args: tuple[str, ...]
) -> None:
    made = container(entrypoint=entrypoint, command=command)
    assert (made.command, made.args) == (program, args)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"ports": ("80:80",), "network": "none"}, "--publish needs the network of pods, not --network none"),
        ({"ports": ("80:80",), "network": "host"}, "--publish needs the network of pods, not --network host"),
        ({"hostname": "web", "network": "host"}, "--hostname can't be with --network host"),
        ({"entrypoint": ""}, '--entrypoint "" needs a command'),
        ({"name": "Web"}, "--name 'Web' must have lower-case letters"),
        ({"env": ("A",)}, "--env 'A' is not NAME=VALUE"),
        ({"directory": "home"}, "the directory 'home' is no absolute path"),
        ({"directory": None, "volumes": ("./here:/there",)}, r"where the path './here' begins is not known"),
        ({"directory": None, "security_opts": ("seccomp=own.json",)}, r"where the path 'own.json' begins is not known"),
        ({"directory": None, "image": "result"}, r"where the path 'result' begins is not known"),
    ],
)
def test_what_cant_be_had(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        single.pod(single.Wanted(**{"directory": "/", "image": "x:1", **values}), attached=True)
    assert caught.value.message.startswith(problem)


def test_relative_paths_begin_where_the_person_is() -> None:
    pod = single.pod(wanted(volumes=("./data:/data:ro",)), attached=True)
    assert pod.volumes == (model.Volume("volume-0", "/home/data", "DirectoryOrCreate"),)
    assert pod.containers[0].mounts == (model.VolumeMount("volume-0", "/data", read_only=True),)


def test_the_input_of_a_container_that_nobody_watches_doesnt_end_with_whoever_comes() -> None:
    for attached in (True, False):
        (made,) = single.pod(wanted(interactive=True), attached=attached).containers
        assert (made.stdin, made.stdin_once) == (True, attached)


def test_rights() -> None:
    made = container(user="www:33", privileged=True, cap_add=("net_raw",), read_only=True, env=("A=$x",))
    assert made.security == model.Security(
        run_as_name="www",
        run_as_group=33,
        privileged=True,
        add_capabilities=("NET_RAW",),
        read_only_root=True,
        seccomp="RuntimeDefault",
    )
    assert made.env == (("A", "$$x"),)
