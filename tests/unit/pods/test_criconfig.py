"""What a pod becomes in the CRI."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet import errors
from nixlet.containers import model
from nixlet.pods import criconfig
from nixlet.rpc.gen import cri_pb2

PLACEMENT = criconfig.Placement("u-1", "/logs/shop_web_u-1", {"data": "/srv/data"}, "/logs/hosts")
MAIN = model.Container(name="main", image="web:1", pull_policy="Never")
POD = model.Pod(name="web", namespace="shop", labels={"app": "web"}, annotations={"note": "n"}, containers=(MAIN,))
IDENTITY = {
    "io.kubernetes.pod.name": "web",
    "io.kubernetes.pod.namespace": "shop",
    "io.kubernetes.pod.uid": "u-1",
    "nixlet.io/made-by": "nixlet",
}


def container_of(pod: model.Pod = POD, **changes: Any) -> cri_pb2.ContainerConfig:
    container = dataclasses.replace(MAIN, **changes)
    pod = dataclasses.replace(pod, containers=(container,))
    return criconfig.container_config(pod, container, "sha256:1", PLACEMENT)


def sandbox_of(**changes: Any) -> cri_pb2.PodSandboxConfig:
    return criconfig.sandbox_config(dataclasses.replace(POD, **changes), PLACEMENT)


def test_a_sandbox_has_its_identity() -> None:
    config = sandbox_of(sysctls={"net.ipv4.ip_forward": "1"})
    assert config.metadata == cri_pb2.PodSandboxMetadata(name="web", uid="u-1", namespace="shop")
    assert dict(config.labels) == {"app": "web"} | IDENTITY
    assert dict(config.annotations) == {"note": "n", criconfig.GRACE: "30"}
    assert config.log_directory == PLACEMENT.log_directory == criconfig.log_directory("/logs", POD, "u-1")
    assert dict(config.linux.sysctls) == {"net.ipv4.ip_forward": "1"}


def test_a_label_of_the_manifest_does_not_pass_for_nixlets_own() -> None:
    config = sandbox_of(labels=dict.fromkeys(IDENTITY, "forged"))
    assert dict(config.labels) == IDENTITY


@pytest.mark.parametrize(
    ("changes", "hostname"),
    [
        ({}, "web"),
        ({"hostname": "front"}, "front"),
        ({"host_network": True, "hostname": "front"}, ""),
        ({"name": "a" * 62 + ".example"}, "a" * 62),
    ],
)
def test_the_hostname(changes: dict[str, object], hostname: str) -> None:
    assert sandbox_of(**changes).hostname == hostname


@pytest.mark.parametrize("network", [True, False])
@pytest.mark.parametrize("pid", [True, False])
@pytest.mark.parametrize("ipc", [True, False])
def test_namespaces_are_the_same_for_the_sandbox_and_its_containers(network: bool, pid: bool, ipc: bool) -> None:
    pod = dataclasses.replace(POD, host_network=network, host_pid=pid, host_ipc=ipc)
    expected = cri_pb2.NamespaceOption(
        network=cri_pb2.NODE if network else cri_pb2.POD,
        pid=cri_pb2.NODE if pid else cri_pb2.CONTAINER,
        ipc=cri_pb2.NODE if ipc else cri_pb2.POD,
    )
    sandbox = criconfig.sandbox_config(pod, PLACEMENT)
    assert sandbox.linux.security_context.namespace_options == expected
    assert container_of(pod).linux.security_context.namespace_options == expected


def test_ports_that_the_host_offers_are_mapped() -> None:
    ports = (model.Port(80, 8080, "127.0.0.1", "UDP"), model.Port(81), model.Port(82, 82, protocol="SCTP"))
    second = dataclasses.replace(MAIN, name="second", ports=(model.Port(90, 90),))
    containers = (dataclasses.replace(MAIN, ports=ports), second)
    assert list(sandbox_of(containers=containers).port_mappings) == [
        cri_pb2.PortMapping(protocol=cri_pb2.UDP, container_port=80, host_port=8080, host_ip="127.0.0.1"),
        cri_pb2.PortMapping(protocol=cri_pb2.SCTP, container_port=82, host_port=82),
        cri_pb2.PortMapping(protocol=cri_pb2.TCP, container_port=90, host_port=90),
    ]
    assert not sandbox_of(containers=containers, host_network=True).port_mappings


def test_a_sandbox_is_privileged_when_any_container_is() -> None:
    privileged = dataclasses.replace(MAIN, security=model.Security(privileged=True))
    assert not sandbox_of().linux.security_context.privileged
    assert sandbox_of(containers=(MAIN, privileged)).linux.security_context.privileged
    assert sandbox_of(init_containers=(privileged,)).linux.security_context.privileged


def test_a_sandbox_runs_as_the_pod_says() -> None:
    context = sandbox_of(run_as_user=0, run_as_group=5, supplemental_groups=(7, 8)).linux.security_context
    assert (context.HasField("run_as_user"), context.run_as_user.value, context.run_as_group.value) == (True, 0, 5)
    assert list(context.supplemental_groups) == [7, 8]
    assert context.seccomp.profile_type == cri_pb2.SecurityProfile.RuntimeDefault
    assert not sandbox_of().linux.security_context.HasField("run_as_user")
    # CRI refuses a group without a user.
    assert not sandbox_of(run_as_group=5).linux.security_context.HasField("run_as_group")


def test_a_container_as_a_whole() -> None:
    config = container_of(
        command=("/bin/$(WORD)",), args=("$(WORD)", "$$(WORD)"), env=(("WORD", "web"), ("TWICE", "$(WORD)-$(WORD)")),
        working_dir="/srv", stdin=True, stdin_once=True, tty=True,
        mounts=(model.VolumeMount("data", "/data", read_only=True), model.VolumeMount("data", "rel")),
    )  # fmt: skip
    assert config.metadata.name == "main"
    assert config.image == cri_pb2.ImageSpec(image="sha256:1", user_specified_image="web:1")
    assert (list(config.command), list(config.args)) == (["/bin/web"], ["web", "$(WORD)"])
    assert [(each.key, each.value) for each in config.envs] == [("WORD", b"web"), ("TWICE", b"web-web")]
    assert list(config.mounts) == [
        cri_pb2.Mount(container_path="/data", host_path="/srv/data", readonly=True),
        cri_pb2.Mount(container_path="/rel", host_path="/srv/data"),
        cri_pb2.Mount(container_path="/etc/hosts", host_path="/logs/hosts"),
    ]
    assert dict(config.labels) == {"io.kubernetes.container.name": "main"} | IDENTITY
    assert (config.log_path, config.working_dir) == ("main/0.log", "/srv")
    assert (config.stdin, config.stdin_once, config.tty) == (True, True, True)


def test_variables_see_those_before_them_and_the_last_of_a_name_counts() -> None:
    env = (("LATE", "$(EARLY)"), ("EARLY", "1"), ("A", "a"), ("A", "$(A)b"), ("SELF", "$(SELF)"))
    found = {each.key: each.value for each in container_of(env=env).envs}
    assert found == {"LATE": b"$(EARLY)", "EARLY": b"1", "A": b"ab", "SELF": b"$(SELF)"}


# The cases of Kubernetes' own documentation of the syntax, and its corners.
@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$(A)", "1"), ("x$(A)$(B)y", "x12y"), ("$$(A)", "$(A)"), ("$$$(A)", "$1"), ("$$$$(A)", "$$(A)"),
        ("$(UNKNOWN)", "$(UNKNOWN)"), ("$A", "$A"), ("${A}", "${A}"), ("$", "$"), ("$$", "$"), ("a$", "a$"),
        ("$(A", "$(A"), ("$()", "$()"), ("$(a.b-c)", "3"), ("$(C)", "$(A)"), ("$((A))", "$((A))"),
        ("$(A$(A))", "$(A$(A))"), ("$(A)$$(B)", "1$(B)"),
    ],
)  # fmt: skip
def test_expansion(text: str, expanded: str) -> None:
    assert criconfig.expand(text, {"A": "1", "B": "2", "a.b-c": "3", "C": "$(A)"}) == expanded


@given(st.text(alphabet="$()AB x"))
def test_escaped_text_stays_what_it_is(text: str) -> None:
    assert criconfig.expand(model.escaped(text), {"A": "1", "B": "2"}) == text


def test_a_containers_security_goes_before_the_pods() -> None:
    pod = dataclasses.replace(POD, run_as_user=1, run_as_group=2, supplemental_groups=(3,), seccomp="RuntimeDefault")
    inherited = container_of(pod).linux.security_context
    assert (inherited.run_as_user.value, inherited.run_as_group.value) == (1, 2)
    assert list(inherited.supplemental_groups) == [3]
    assert inherited.seccomp.profile_type == cri_pb2.SecurityProfile.RuntimeDefault
    own = container_of(
        pod, security=model.Security(run_as_user=0, no_new_privileges=True, read_only_root=True, seccomp="Unconfined")
    ).linux.security_context
    assert (own.HasField("run_as_user"), own.run_as_user.value, own.run_as_group.value) == (True, 0, 2)
    assert (own.no_new_privs, own.readonly_rootfs) == (True, True)
    assert own.seccomp.profile_type == cri_pb2.SecurityProfile.Unconfined


def test_without_a_word_a_container_is_unconfined_by_seccomp_and_runs_as_its_image_says() -> None:
    context = container_of().linux.security_context
    assert context.seccomp.profile_type == cri_pb2.SecurityProfile.Unconfined
    assert not context.HasField("run_as_user")
    assert not context.HasField("run_as_group")


def test_profiles_of_the_hosts() -> None:
    own = container_of(security=model.Security(seccomp="/srv/p.json", apparmor="mine")).linux.security_context
    local = cri_pb2.SecurityProfile.Localhost
    assert own.seccomp == cri_pb2.SecurityProfile(profile_type=local, localhost_ref="/srv/p.json")
    assert own.apparmor == cri_pb2.SecurityProfile(profile_type=local, localhost_ref="mine")
    free = container_of(security=model.Security(apparmor="unconfined")).linux.security_context
    assert free.apparmor.profile_type == cri_pb2.SecurityProfile.Unconfined
    assert not container_of().linux.security_context.HasField("apparmor")


def test_only_privileged_containers_see_all_of_proc_and_sys() -> None:
    plain = container_of(security=model.Security(add_capabilities=("NET_ADMIN",), drop_capabilities=("ALL",)))
    context = plain.linux.security_context
    assert {"/proc/kcore", "/sys/firmware"} <= set(context.masked_paths)
    assert "/proc/sys" in context.readonly_paths
    assert list(context.capabilities.add_capabilities) == ["NET_ADMIN"]
    assert list(context.capabilities.drop_capabilities) == ["ALL"]
    privileged = container_of(security=model.Security(privileged=True)).linux.security_context
    assert privileged.privileged
    assert not privileged.masked_paths
    assert not privileged.readonly_paths


@pytest.mark.parametrize(
    ("resources", "shares", "quota"),
    [
        (model.Resources(), 2, 0),
        (model.Resources(cpu_request=500), 512, 0),
        (model.Resources(cpu_limit=250), 256, 25_000),
        (model.Resources(cpu_request=100, cpu_limit=1500), 102, 150_000),
        (model.Resources(cpu_request=1, cpu_limit=1), 2, 1_000),
        (model.Resources(cpu_request=1_000_000), 262_144, 0),
    ],
)
def test_cpu(resources: model.Resources, shares: int, quota: int) -> None:
    linux = container_of(resources=resources).linux.resources
    assert (linux.cpu_shares, linux.cpu_quota, linux.cpu_period) == (shares, quota, 100_000 if quota else 0)


CAPACITY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("resources", "score"),
    [
        (model.Resources(), 1000),  # best effort
        (model.Resources(500, 500, 1 << 20, 1 << 20), -997),  # guaranteed
        (model.Resources(cpu_limit=500, memory_limit=1 << 20), -997),
        (model.Resources(cpu_request=500), 999),  # burstable, from here on
        (model.Resources(memory_request=1), 999),
        (model.Resources(memory_limit=CAPACITY // 2), 500),
        (model.Resources(memory_request=CAPACITY // 4 + 1, memory_limit=CAPACITY), 750),
        (model.Resources(memory_request=CAPACITY), 3),
        (model.Resources(memory_request=2 * CAPACITY), 3),
        (model.Resources(100, 500, 1 << 20, 1 << 20), 999),
    ],
)
def test_oom_scores_follow_the_class_of_service(resources: model.Resources, score: int) -> None:
    linux = container_of(resources=resources).linux.resources
    assert linux.oom_score_adj == score
    assert linux.memory_limit_in_bytes == resources.memory_limit


def test_one_container_without_limits_makes_the_whole_pod_burstable() -> None:
    guaranteed = dataclasses.replace(MAIN, resources=model.Resources(cpu_limit=500, memory_limit=1 << 20))
    for pod in (
        dataclasses.replace(POD, containers=(guaranteed, MAIN)),
        dataclasses.replace(POD, containers=(guaranteed,), init_containers=(MAIN,)),
    ):
        config = criconfig.container_config(pod, guaranteed, "sha256:1", PLACEMENT)
        assert config.linux.resources.oom_score_adj == 999


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("missing", "Directory", ": No such file or directory"),
        ("file", "Directory", " to be a Directory"), ("file", "DirectoryOrCreate", " to be a Directory"),
        ("directory", "FileOrCreate", " to be a File"), ("file", "Socket", " to be a Socket"),
        ("file", "CharDevice", " to be a CharDevice"), ("file", "BlockDevice", " to be a BlockDevice"),
        ("file/below", "DirectoryOrCreate", ": Not a directory"),
        ("missing/below", "FileOrCreate", ": No such file or directory"),
    ],
)  # fmt: skip
def test_host_paths_that_do_not_fit(tmp_path: Path, name: str, kind: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    with pytest.raises(errors.FailedPreconditionError) as caught:
        criconfig.check_host_path(model.Volume("data", str(tmp_path / name), kind))
    assert caught.value.message == f"the volume data needs {tmp_path / name}{reason}"
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]


def test_host_paths_that_are_made(tmp_path: Path) -> None:
    for _ in range(2):
        criconfig.check_host_path(model.Volume("data", str(tmp_path / "a" / "b"), "DirectoryOrCreate"))
        criconfig.check_host_path(model.Volume("data", str(tmp_path / "a" / "file"), "FileOrCreate"))
        criconfig.check_host_path(model.Volume("data", str(tmp_path / "a"), ""))
        criconfig.check_host_path(model.Volume("data", str(tmp_path / "c" / "d"), ""))
    assert (tmp_path / "a" / "b").is_dir()
    assert (tmp_path / "c" / "d").is_dir()
    assert (tmp_path / "a" / "file").read_bytes() == b""
    criconfig.check_host_path(model.Volume("data", "/dev/null", "CharDevice"))


def test_a_pods_ports_are_kept_where_those_who_list_pods_find_them() -> None:
    ports = (
        model.Port(80, 8080),
        model.Port(53, 53, "::1", "UDP"),
        model.Port(9, 9, "10.0.0.1", "SCTP"),
        model.Port(81),
    )
    config = sandbox_of(containers=(dataclasses.replace(MAIN, ports=ports),))
    assert config.annotations[criconfig.PORTS] == "0.0.0.0:8080->80/tcp, [::1]:53->53/udp, 10.0.0.1:9->9/sctp"
    assert tuple(criconfig.ports_of(config.annotations)) == ports[:3]
    assert (
        criconfig.PORTS
        not in sandbox_of(host_network=True, containers=(dataclasses.replace(MAIN, ports=ports),)).annotations
    )
    assert criconfig.ports_of({criconfig.PORTS: "nonsense, 1->2, 0.0.0.0:x->1/tcp"}) == criconfig.ports_of({}) == []


def test_a_manifest_can_not_claim_what_nixlet_notes() -> None:
    annotations = {
        criconfig.PORTS: "0.0.0.0:22->22/tcp",
        criconfig.NO_NETWORK: "true",
        criconfig.GRACE: "1",
        "note": "n",
    }
    assert dict(sandbox_of(annotations=annotations).annotations) == {"note": "n", criconfig.GRACE: "30"}
    assert sandbox_of(no_network=True).annotations[criconfig.NO_NETWORK] == "true"


def test_a_user_by_name() -> None:
    context = container_of(security=model.Security(run_as_name="www", run_as_group=33)).linux.security_context
    assert (context.run_as_username, context.run_as_group.value, context.HasField("run_as_user")) == ("www", 33, False)


def test_a_pod_without_a_network_is_on_the_hosts_for_cri() -> None:
    pod = dataclasses.replace(POD, no_network=True)
    config = sandbox_of(no_network=True)
    assert (config.hostname, config.linux.security_context.namespace_options.network) == ("", cri_pb2.NODE)
    assert container_of(pod).linux.security_context.namespace_options.network == cri_pb2.NODE
    servers = cri_pb2.DNSConfig(servers=["192.0.2.7"])
    assert criconfig.sandbox_config(pod, PLACEMENT, servers).dns_config == servers


@pytest.mark.parametrize("own", [False, True])
def test_the_file_of_a_pods_own_name(*, own: bool) -> None:
    placement = dataclasses.replace(PLACEMENT, hostname="/logs/hostname")
    mounts = (model.VolumeMount("data", "/etc/hostname"),) if own else ()
    security = model.Security(read_only_root=True)
    container = dataclasses.replace(MAIN, mounts=mounts, security=security)
    found = criconfig.container_config(POD, container, "sha256:1", placement).mounts
    file = [(each.host_path, each.readonly) for each in found if each.container_path == "/etc/hostname"]
    assert file == [("/srv/data", False) if own else ("/logs/hostname", True)]
    assert "/etc/hostname" not in [each.container_path for each in container_of().mounts]


def test_where_systemd_makes_the_cgroups_a_pod_names_a_slice() -> None:
    assert criconfig.sandbox_config(POD, PLACEMENT, systemd_cgroup=True).linux.cgroup_parent == "system.slice"
    assert criconfig.sandbox_config(POD, PLACEMENT).linux.cgroup_parent == ""
