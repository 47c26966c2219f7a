"""Good manifests: every supported field arrives in the value."""

import json
import os
import uuid
from typing import Any

import pytest

from nixlet import errors
from nixlet.containers import model
from nixlet.kube import manifest
from nixlet.pods import criconfig

FULL = """\
apiVersion: v1
kind: Pod
metadata:
  name: web.example
  namespace: shop
  labels: {app: web, "8080": "yes"}
  annotations:
    note: |
      two
      lines
  creationTimestamp: null
  uid: 0c0e
spec:
  restartPolicy: OnFailure
  hostname: front
  runtimeClassName: crun
  hostNetwork: true
  hostPID: true
  hostIPC: true
  hostUsers: true
  dnsPolicy: ClusterFirst
  terminationGracePeriodSeconds: 7
  securityContext:
    runAsUser: 1000
    runAsGroup: 2000
    supplementalGroups: [5, 6]
    seccompProfile: {type: RuntimeDefault}
    sysctls:
    - {name: net.ipv4.ip_forward, value: "1"}
  volumes:
  - name: scratch
    emptyDir: {}
  - name: data
    hostPath: {path: /srv/data, type: DirectoryOrCreate}
  initContainers:
  - {name: prepare, image: "nix:0/tmp/prepare.tar"}
  containers:
  - name: main
    image: registry.example:5000/web:1
    imagePullPolicy: Never
    command: [/bin/web]
    args: ["--port", "80"]
    workingDir: /srv
    env:
    - {name: HOME, value: /srv}
    - {name: EMPTY}
    ports:
    - {name: http, containerPort: 80, hostPort: 8080, hostIP: 127.0.0.1, protocol: UDP}
    - {containerPort: 81}
    volumeMounts:
    - {name: scratch, mountPath: /tmp}
    - {name: data, mountPath: /data, readOnly: true}
    resources:
      requests: {cpu: 250m, memory: 64Mi}
      limits: {cpu: 1.5, memory: 128Mi}
    securityContext:
      runAsUser: 0
      runAsGroup: 1
      privileged: true
      readOnlyRootFilesystem: true
      allowPrivilegeEscalation: false
      capabilities: {add: [NET_ADMIN, CAP_SYS_TIME], drop: [all, cap_net_raw]}
      seccompProfile: {type: Unconfined}
    stdin: true
    stdinOnce: true
    tty: true
"""

MINIMAL: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "small"},
    "spec": {"containers": [{"name": "main", "image": "hello:1"}]},
}


def parse_one(text: str | bytes) -> model.Pod:
    found, notices = manifest.parse(text.encode() if isinstance(text, str) else text, "pod.yaml")
    assert notices == []
    (pod,) = found
    return pod


def with_spec(**spec: Any) -> str:
    return json.dumps(MINIMAL | {"spec": MINIMAL["spec"] | spec})


def with_container(**fields: Any) -> str:
    return with_spec(containers=[{"name": "main", "image": "hello:1"} | fields])


def test_every_field_arrives() -> None:
    assert parse_one(FULL) == model.Pod(
        name="web.example",
        namespace="shop",
        labels={"app": "web", "8080": "yes"},
        annotations={"note": "two\nlines\n"},
        containers=(
            model.Container(
                name="main",
                image="registry.example:5000/web:1",
                pull_policy="Never",
                command=("/bin/web",),
                args=("--port", "80"),
                env=(("HOME", "/srv"), ("EMPTY", "")),
                working_dir="/srv",
                ports=(model.Port(80, 8080, "127.0.0.1", "UDP"), model.Port(81)),
                mounts=(model.VolumeMount("scratch", "/tmp"), model.VolumeMount("data", "/data", read_only=True)),
                resources=model.Resources(250, 1500, 64 << 20, 128 << 20),
                security=model.Security(
                    run_as_user=0,
                    run_as_group=1,
                    privileged=True,
                    read_only_root=True,
                    no_new_privileges=True,
                    add_capabilities=("NET_ADMIN", "SYS_TIME"),
                    drop_capabilities=("ALL", "NET_RAW"),
                    seccomp="Unconfined",
                ),
                stdin=True,
                stdin_once=True,
                tty=True,
            ),
        ),
        init_containers=(model.Container(name="prepare", image="nix:0/tmp/prepare.tar", pull_policy="Always"),),
        volumes=(model.Volume("scratch"), model.Volume("data", "/srv/data", "DirectoryOrCreate")),
        restart_policy="OnFailure",
        hostname="front",
        runtime="crun",
        host_network=True,
        host_pid=True,
        host_ipc=True,
        run_as_user=1000,
        run_as_group=2000,
        supplemental_groups=(5, 6),
        seccomp="RuntimeDefault",
        sysctls={"net.ipv4.ip_forward": "1"},
        grace_seconds=7,
    )


def test_what_is_left_out_has_kubernetes_defaults() -> None:
    pod = parse_one(json.dumps(MINIMAL))
    assert pod == model.Pod(name="small", containers=(model.Container("main", "hello:1", "IfNotPresent"),))
    assert (pod.namespace, pod.restart_policy, pod.grace_seconds) == ("default", "Always", 30)


def test_null_is_as_good_as_nothing() -> None:
    fields = ("command", "args", "env", "workingDir", "ports", "volumeMounts", "resources", "securityContext", "tty")
    container = dict.fromkeys(fields) | {"name": "main", "image": "hello:1"}
    spec = dict.fromkeys(("hostname", "hostNetwork", "volumes", "initContainers", "restartPolicy", "securityContext"))
    document = {
        **MINIMAL,
        "metadata": {"name": "small", "namespace": None, "labels": None, "annotations": None},
        "spec": spec | {"containers": [container], "terminationGracePeriodSeconds": None, "nodeName": None},
    }
    assert parse_one(json.dumps(document)) == parse_one(json.dumps(MINIMAL))
    assert parse_one(json.dumps(document).replace("null", "~")) == parse_one(json.dumps(MINIMAL))


@pytest.mark.parametrize(
    ("image", "policy"),
    [
        ("hello", "Always"),
        ("hello:latest", "Always"),
        ("registry.example:5000/hello", "Always"),
        ("hello:1", "IfNotPresent"),
        ("registry.example:5000/hello:1", "IfNotPresent"),
        ("hello@sha256:" + "0" * 64, "IfNotPresent"),
        ("hello:latest@sha256:" + "0" * 64, "IfNotPresent"),
    ],
)
def test_the_pull_policy_follows_the_tag(image: str, policy: str) -> None:
    assert parse_one(with_container(image=image)).containers[0].pull_policy == policy


def test_escalation_is_forbidden_only_where_false_stands() -> None:
    for value, expected in ((True, False), (None, False), (False, True)):
        pod = parse_one(with_container(securityContext={"allowPrivilegeEscalation": value}))
        assert pod.containers[0].security.no_new_privileges is expected


@pytest.mark.parametrize("address", ["", "0.0.0.0", "127.0.0.1", "::1", "::"])
def test_addresses_of_the_host(address: str) -> None:
    port = parse_one(with_container(ports=[{"containerPort": 80, "hostIP": address}])).containers[0].ports[0]
    assert port.host_ip == address


def test_a_port_of_the_host_may_be_given_twice_where_that_is_not_the_same() -> None:
    places: list[dict[str, Any]] = [
        {"protocol": "TCP", "hostIP": "127.0.0.1"},
        {"protocol": "UDP"},
        {"protocol": "TCP", "hostIP": "10.1.2.3"},
        {"protocol": "TCP", "hostIP": "::"},
    ]
    ports = [{"containerPort": 80, "hostPort": 8080, **each} for each in places]
    assert len(parse_one(with_container(ports=ports)).containers[0].ports) == len(ports)


def test_a_request_may_be_all_of_the_limit_or_stand_alone() -> None:
    for requests, limits in (({"cpu": "1000m"}, {"cpu": 1}), ({"memory": "8Gi"}, {"cpu": 1}), ({"cpu": 4}, {})):
        parse_one(with_container(resources={"requests": requests, "limits": limits}))


def test_several_documents_are_several_pods() -> None:
    one, two = json.dumps(MINIMAL), json.dumps(MINIMAL | {"metadata": {"name": "other"}})
    found, _ = manifest.parse(f"---\n{one}\n---\n# nothing here\n---\n~\n---\n{two}\n...\n".encode(), "pod.yaml")
    assert [pod.name for pod in found] == ["small", "other"]


def test_the_line_of_a_fault_in_the_second_document_counts_from_the_top_of_the_file() -> None:
    bad = json.dumps(MINIMAL | {"metadata": {"name": "Other"}})
    with pytest.raises(errors.UsageError, match=r"^pod\.yaml, line 4: metadata\.name is 'Other'"):
        manifest.parse(f"---\n{json.dumps(MINIMAL)}\n---\n{bad}\n".encode(), "pod.yaml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_encodings_of_yaml(encoding: str) -> None:
    text = json.dumps(MINIMAL | {"metadata": {"name": "small", "labels": {"greeting": "grüß"}}}, ensure_ascii=False)
    assert parse_one(text.encode(encoding)).labels == {"greeting": "grüß"}


def test_aliases_are_values_like_others() -> None:
    document = json.dumps(MINIMAL).replace('"hello:1"', '&image "hello:1"')
    pod = parse_one(document.replace("}]}", "}, {name: second, image: *image}]}"))
    assert [(each.name, each.image) for each in pod.containers] == [("main", "hello:1"), ("second", "hello:1")]


def test_what_only_a_cluster_heeds_is_accepted_with_a_notice() -> None:
    cluster = {
        "nodeSelector": {"disk": "ssd"},
        "nodeName": "node-1",
        "tolerations": [{"operator": "Exists"}],
        "affinity": {},
        "topologySpreadConstraints": [],
        "priority": 1,
        "priorityClassName": "high",
        "preemptionPolicy": "Never",
        "schedulerName": "mine",
        "serviceAccountName": "web",
        "serviceAccount": "web",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
    }
    document = json.loads(with_spec(**cluster)) | {"status": {"phase": "Running"}}
    found, notices = manifest.parse(json.dumps(document).encode(), "pod.yaml")
    assert found == [parse_one(json.dumps(MINIMAL))]
    paths = ["status", *(f"spec.{field}" for field in cluster)]
    assert notices == [f"{path} has no effect without a cluster" for path in paths]


def test_what_nobody_reads_is_said_to_be_passed_over() -> None:
    fields = {"terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File"}
    _, notices = manifest.parse(with_container(**fields).encode(), "pod.yaml")
    assert notices == [f"spec.containers[0].{field} has no effect without a cluster" for field in fields]


def test_a_pods_names_fit_into_a_files_name() -> None:
    longest = {"name": "a" * 154, "namespace": "b" * 63}
    pod = parse_one(json.dumps(MINIMAL | {"metadata": longest}))
    assert len(os.path.basename(criconfig.log_directory("/logs", pod, str(uuid.uuid4())))) == 255
    with pytest.raises(errors.UsageError, match=r"line 1: metadata\.name is too long: .* 217 characters"):
        parse_one(json.dumps(MINIMAL | {"metadata": longest | {"name": "a" * 155}}))


def test_names_of_its_own() -> None:
    aliases = [{"ip": "192.0.2.1", "hostnames": ["db", "db.example"]}, {"ip": "::5", "hostnames": ["six"]}]
    assert parse_one(with_spec(hostAliases=aliases)).host_aliases == (
        model.HostAlias("192.0.2.1", ("db", "db.example")),
        model.HostAlias("::5", ("six",)),
    )


def test_restart_policies_are_mentioned_where_nothing_restarts() -> None:
    found = [parse_one(with_spec(restartPolicy=policy)) for policy in model.RESTART_POLICIES]
    assert manifest.restart_notices(found) == [
        f"pod small: restartPolicy {policy}, but nothing restarts its containers without a kubelet"
        for policy in ("Always", "OnFailure")
    ]


@pytest.mark.parametrize("name", ["a", "0", "a-b", "a--b", "a" * 63])
def test_a_name_that_a_person_chose(name: str) -> None:
    assert model.checked_name(name, "the name") == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a.b", "a_b", "a\n", "ä", "a" * 64])
def test_a_name_that_no_container_can_have(name: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        model.checked_name(name, "the name")
    assert caught.value.message == (
        f"the name {name!r} must have lower-case letters, digits and '-' only, begin and end with a letter or a digit,"
        " and have 63 characters at most"
    )
