"""`nixlet server` with Kubernetes' programs is a whole cluster: what is in it, and what goes on when parts of it end."""

import base64
import contextlib
import functools
import ipaddress
import json
import re
import secrets
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from cryptography import x509

from nixlet.containerd import runtimes
from support import kubernetes, nodes, parts, registries, storeimages

pytestmark = pytest.mark.timeout(600)

#: The port of a registry.
REGISTRY_PORT = 5991

#: How a containerd says that a registry lets nobody in, by version.
UNAUTHORISED = ("401 Unauthorized", "no basic auth credentials", "authorization failed")


#: The version of a kubelet's configuration.
KUBELET = "kubelet.config.k8s.io/v1beta1"

#: As people write it for k3s.
CONFIGURATION = """
tls-san:
  - cluster.example
node-label:
  - shown=yes
node-taint:
  - odd=yes:PreferNoSchedule
disable:
  - traefik
  - servicelb
  - metrics-server
disable-network-policy: true
secrets-encryption: true
etcd-snapshot-retention: 5
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kubernetes.Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    containerd = str(parts.containerd(parts.CONTAINERDS[-1]))
    made = kubernetes.Cluster(63, directory, "--containerd", containerd, "--kubelet-arg", "max-pods=99")
    file = directory / "config.yaml"
    file.write_text(CONFIGURATION)
    made.environment["NIXLET_CONFIG_FILE"] = str(file)
    # Like NVIDIA's, it has a real runc behind it.
    programs = tmp_path_factory.mktemp("runtimes")
    (programs / "nvidia-container-runtime").symlink_to("/usr/sbin/runc")
    made.environment["PATH"] = f"{programs}:{made.environment['PATH']}"
    with kubernetes.cleaned_up(made):
        made.start()
        made.await_node()
        yield made


def test_pods_have_addresses_of_the_nodes_part(cluster: kubernetes.Cluster, archives: Path) -> None:
    image = storeimages.make(archives, 3)
    cluster.kubectl(
        "run", "address", f"--image={image.reference}", "--restart=Never", "--command", "--", "/bin/sleep", "1000"
    )  # fmt: skip
    cluster.await_phase("address", "Running")
    (node,) = cluster.get("nodes")["items"]
    pod = cluster.get("pod", "address")["status"]
    assert ipaddress.ip_address(pod["podIP"]) in ipaddress.ip_network(node["spec"]["podCIDR"])
    assert pod["hostIP"] == cluster.address
    # The API server reaches the kubelet, and is known to it.
    assert cluster.kubectl("exec", "address", "--", "/bin/echo", "inside") == "inside\n"
    cluster.kubectl("delete", "pod", "address", "--now")


def test_a_pod_by_another_runtime(cluster: kubernetes.Cluster, archives: Path) -> None:
    """The classes of k3s's names are there, and such a pod runs by the runtime that the machine has."""

    def classes() -> dict[str, str]:
        return {each["metadata"]["name"]: each["handler"] for each in cluster.get("runtimeclasses")["items"]}

    kubernetes.until(lambda: "nvidia" in classes(), f"the classes are there: {cluster.log}")
    assert classes() == {name: name for name in runtimes.NAMES}
    image = storeimages.make(archives, 3)
    overrides = json.dumps({"spec": {"runtimeClassName": "nvidia"}})
    run = ["--restart=Never", f"--image={image.reference}", f"--overrides={overrides}", "--command", "--"]
    cluster.kubectl("run", "graphical", *run, "/bin/sleep", "1000")
    cluster.await_phase("graphical", "Running")
    assert cluster.kubectl("exec", "graphical", "--", "/bin/echo", "inside") == "inside\n"
    (pod,) = cluster.crictl("pods", "--name", "^graphical$", "-q").split()
    assert json.loads(cluster.crictl("inspectp", pod))["status"]["runtimeHandler"] == "nvidia"
    cluster.kubectl("delete", "pod", "graphical", "--now")


def test_what_is_secret_is_for_root_alone(cluster: kubernetes.Cluster) -> None:
    server, agent = cluster.data_dir / "server", cluster.data_dir / "agent"
    for directory in (server / "tls", server / "cred", server / "db", agent / "etc" / "kubelet.conf.d", agent / "logs"):
        assert directory.stat().st_mode & 0o077 == 0, directory
    for file in (server / "token", cluster.kubeconfig, agent / "kubelet.kubeconfig", agent / "client-kubelet.key"):
        assert file.stat().st_mode & 0o077 == 0, file
    token = (server / "token").read_text().strip()
    assert token.startswith("K10")
    password = token.rpartition(":")[2]
    printed = cluster.log.read_text() + cluster.ok("server", *cluster.arguments, "--show-config")
    assert password not in printed
    assert str(server / "token") in printed


def test_who_may_do_what(cluster: kubernetes.Cluster) -> None:
    """What a server applies by itself: the API server reaches kubelets; a bootstrap token gets no certificate of any node from it."""

    def may(verb: str, what: str, *who: str) -> bool:
        return cluster.kubectl("auth", "can-i", verb, what, *who, check=False).strip() == "yes"

    assert may("get", "nodes/proxy", "--as=system:apiserver")
    assert not may("get", "secrets", "--as=system:apiserver")
    bootstrapped = ("--as=system:bootstrap:abcdef", "--as-group=system:bootstrappers")
    for verb, what in (("create", "certificatesigningrequests"), ("list", "pods")):
        assert not may(verb, what, *bootstrapped)
        assert not may(verb, what, *bootstrapped, "--as-group=system:bootstrappers:nixlet:default-node-token")


def test_nobody_is_let_in_unknown(cluster: kubernetes.Cluster) -> None:
    context = ssl.create_default_context(cafile=str(cluster.data_dir / "agent" / "server-ca.crt"))
    for url in (f"https://{cluster.address}:6443/api/v1/namespaces", f"https://{cluster.address}:10250/pods"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url, context=context)
        caught.value.close()
        assert caught.value.code == 401, url


def test_a_file_for_k3s_holds(cluster: kubernetes.Cluster) -> None:
    (node,) = cluster.get("nodes")["items"]
    labels = node["metadata"]["labels"]
    assert (labels["shown"], labels["nixlet.io/nix-images"]) == ("yes", "true")
    assert (labels["nixlet.io/strategy"], labels["runtime.nixlet.io/runc"]) == ("view", "true")
    assert {"key": "odd", "value": "yes", "effect": "PreferNoSchedule"} in node["spec"]["taints"]
    assert node["status"]["capacity"]["pods"] == "99"
    shown = x509.load_pem_x509_certificate(ssl.get_server_certificate((cluster.address, 6443)).encode())
    names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "cluster.example" in names.get_values_for_type(x509.DNSName)
    # What means nothing here is told.
    for key in ("disable-network-policy", "etcd-snapshot-retention"):
        assert f"{key} is passed over: " in cluster.log.read_text()


def test_secrets_are_not_in_the_datastore_as_they_are(cluster: kubernetes.Cluster) -> None:
    secret, plain = secrets.token_hex(16), secrets.token_hex(16)
    cluster.kubectl("create", "secret", "generic", "kept", f"--from-literal=word={secret}")
    cluster.kubectl("create", "configmap", "kept", f"--from-literal=word={plain}")
    files = [path for path in (cluster.data_dir / "server/db/etcd").rglob("*") if path.is_file()]
    stored = b"".join(path.read_bytes() for path in files)
    assert plain.encode() in stored
    assert secret.encode() not in stored
    assert base64.b64encode(secret.encode()) not in stored
    read = cluster.get("secret", "kept")["data"]["word"]
    assert base64.b64decode(read).decode() == secret
    cluster.kubectl("delete", "secret/kept", "configmap/kept")


def test_it_listens_on_loopback_and_the_node_s_address_alone(cluster: kubernetes.Cluster) -> None:
    ours = set(nodes.with_descendants([cluster.pid]))
    listed = subprocess.run(["ss", "-ltunpH"], capture_output=True, text=True, check=True).stdout
    places = {}
    for line in listed.splitlines():
        if ours & set(map(int, re.findall(r"pid=(\d+)", line))):
            host, _, port = line.split()[4].rpartition(":")
            places[int(port)] = host.strip("[]")
    assert {2379, 6443, 6444, 10250, 10257, 10259} <= set(places)
    assert set(places.values()) <= {"127.0.0.1", cluster.address}, places


def test_doctor_knows_the_cluster(cluster: kubernetes.Cluster) -> None:
    found = json.loads(cluster.run("doctor", *cluster.arguments, "--output", "json").stdout)
    ours = {each["name"]: each for each in found if each["group"] == "Kubernetes"}
    assert {name: each["status"] for name, each in ours.items()} == dict.fromkeys(
        (
            "programs",
            "settings",
            "datastore",
            "services",
            "flannel",
            "route",
            "certificates",
            "ports",
            "kubeconfig",
            "kubelet",
        ),
        "ok",
    ), ours
    assert "kube-apiserver 1.36.3" in ours["programs"]["evidence"]
    children = {each["name"] for each in found if each["group"] == "children"}
    assert {"containerd", "etcd", "kube-apiserver", "kubelet", "kube-proxy"} <= children


def test_pods_look_names_up(cluster: kubernetes.Cluster, archives: Path) -> None:
    """CoreDNS is made of the program on PATH, and is where pods are told to ask."""
    try:
        kubernetes.until(lambda: is_available(cluster, "coredns"), "the cluster's DNS is there")
    except AssertionError:
        print(cluster.kubectl("describe", "pods", "-n", "kube-system"))
        print(cluster.kubectl("logs", "-n", "kube-system", "deploy/coredns", check=False))
        raise
    (pod,) = cluster.get("pods", "-n", "kube-system", "-l", "k8s-app=kube-dns")["items"]
    assert pod["spec"]["containers"][0]["image"].startswith("localhost/nixlet/coredns:")
    assert cluster.get("service", "-n", "kube-system", "kube-dns")["spec"]["clusterIP"] == "10.43.0.10"
    image = storeimages.make(archives, 3)
    serve = [
        "/bin/sh",
        "-c",
        "/bin/busybox mkdir /www && echo hello >/www/index.html && exec /bin/busybox httpd -f -p 8080 -h /www",
    ]
    run = ["--restart=Never", f"--image={image.reference}", "--command", "--"]
    cluster.kubectl("run", "web", "--port=8080", "--expose", *run, *serve)
    image, shell = storeimages.make_bash(archives)
    run = ["--restart=Never", f"--image={image.reference}", "--command", "--"]
    cluster.kubectl("run", "asking", *run, "/bin/sleep", "1000")
    cluster.await_phase("web", "Running")
    cluster.await_phase("asking", "Running")

    assert "Address: 10.43.0.1\n" in cluster.kubectl(
        "exec", "asking", "--", "/bin/busybox", "nslookup", "kubernetes.default.svc.cluster.local", check=False
    )
    # As programs do it, by the C library and the names that people use, and all the way to who is called so.
    fetch = "exec 3<>/dev/tcp/{}/8080 && echo 'GET / HTTP/1.0' >&3 && echo >&3 && while read -r line <&3; do last=$line; done; echo $last"
    for name in ("web", "web.default", "web.default.svc", "web.default.svc.cluster.local"):
        kubernetes.until(
            functools.partial(answers, cluster, [*shell, "-c", fetch.format(name)], "hello\n"), f"{name} answers"
        )
    # The node as well: it was named before anybody asked.
    for where in ("kubernetes.default.svc/443", f"node-{cluster.number}/10250"):
        opened = f"exec 3<>/dev/tcp/{where} && echo open"
        assert cluster.kubectl("exec", "asking", "--", *shell, "-c", opened) == "open\n"
    found = cluster.kubectl("exec", "asking", "--", "/bin/busybox", "nslookup", f"node-{cluster.number}.", check=False)
    assert f"Address: {cluster.address}\n" in found
    cluster.kubectl("delete", "service/web", "pod/web", "pod/asking", "--now")


def answers(cluster: kubernetes.Cluster, command: list[str], wanted: str) -> bool:
    return cluster.kubectl("exec", "asking", "--", *command, check=False) == wanted


def is_available(cluster: kubernetes.Cluster, deployment: str) -> bool:
    found = cluster.get("deployments", "-n", "kube-system")["items"]
    return any(
        each["metadata"]["name"] == deployment and each["status"].get("availableReplicas") == 1 for each in found
    )


def test_pull_secrets_open_a_registry_for_their_pods_alone(
    cluster: kubernetes.Cluster, ordinary: Path, archives: Path, tmp_path: Path
) -> None:
    """An ordinary image and one of store paths, in a registry that wants a password."""
    image = storeimages.make(archives, 5, salt="locked")
    credentials = f"{registries.USER}:{registries.PASSWORD}"
    with registries.running(tmp_path, REGISTRY_PORT, login=True) as registry:
        registry.push(ordinary, "locked/ordinary:1", "--dest-creds", credentials)
        registry.push(image.archive, "locked/paths:1", "--dest-creds", credentials)
        for name, password in (("right", registries.PASSWORD), ("wrong", "not-it")):
            cluster.kubectl(
                *("create", "secret", "docker-registry", name, f"--docker-server={registry.address}"),
                *(f"--docker-username={registries.USER}", f"--docker-password={password}"),
            )
        references = {name: f"{registry.address}/locked/{name}:1" for name in ("ordinary", "paths")}
        # (the last has them pulled by credentials, and not found where others' credentials have brought them)
        for secrets in ((), ("wrong",), ("wrong", "right"), ()):
            cluster.kubectl("apply", "-f", "-", stdin=locked_pod(references, secrets))
            if "right" in secrets:
                cluster.await_phase("locked", "Succeeded")
                for name in references:
                    assert cluster.kubectl("logs", "locked", "-c", name) == f"this is {name}\n"
            else:
                for name, reference in references.items():
                    said = refusal(cluster, name)
                    assert reference in said
                    assert any(each in said for each in UNAUTHORISED), said
                    assert "not-it" not in said
            cluster.kubectl("delete", "pod", "locked", "--now")
    assert registries.PASSWORD not in cluster.log.read_text()
    cluster.kubectl("delete", "secret", "right", "wrong")


def locked_pod(references: Mapping[str, str], secrets: Sequence[str]) -> bytes:
    """A pod with a container for each image, which prints its own name."""
    containers = [
        {"name": name, "image": reference, "command": ["/bin/echo", f"this is {name}"]}
        for name, reference in references.items()
    ]
    spec = {
        "containers": containers,
        "restartPolicy": "Never",
        "imagePullSecrets": [{"name": each} for each in secrets],
    }
    return json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "locked"}, "spec": spec}).encode()


def refusal(cluster: kubernetes.Cluster, container: str) -> str:
    """Why a container's image can't be pulled, as its events say."""
    found = ""

    def is_there() -> bool:
        nonlocal found
        pod = cluster.get("pod", "locked")["metadata"]["uid"]
        events = cluster.get("events", "--field-selector", f"involvedObject.uid={pod},reason=Failed")["items"]
        of_it = [
            each["message"]
            for each in events
            if each["involvedObject"].get("fieldPath") == f"spec.containers{{{container}}}"
            and each["message"].startswith("Failed to pull")
        ]
        found = of_it[0] if of_it else ""
        return bool(found)

    kubernetes.until(is_there, f"{container} is refused: {cluster.kubectl('describe', 'pod', 'locked')}")
    return found


def test_manifests_are_applied_and_their_faults_told(cluster: kubernetes.Cluster) -> None:
    directory = cluster.data_dir / "server" / "manifests"
    file = directory / "mine.yaml"
    config_map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: mine}\ndata: {x: '%s'}\n"

    def data() -> object:
        found = cluster.get("configmaps")["items"]
        return next((each["data"] for each in found if each["metadata"]["name"] == "mine"), None)

    file.write_text(config_map % "1")
    kubernetes.until(lambda: data() == {"x": "1"}, f"the manifest is applied: {cluster.log}")
    file.write_text(config_map % "2")
    kubernetes.until(lambda: data() == {"x": "2"}, f"the change is applied: {cluster.log}")
    file.write_text("kind: [\n")
    kubernetes.until(lambda: "the manifest mine.yaml is not applied" in cluster.log.read_text(), "the fault is logged")
    (told,) = [
        each
        for each in json.loads(cluster.run("doctor", *cluster.arguments, "--output", "json").stdout)
        if each["name"] == "manifests"
    ]
    assert "mine.yaml can't be read" in told["evidence"]
    assert data() == {"x": "2"}
    # A file that goes takes nothing along.
    file.unlink()
    kubernetes.until(
        lambda: cluster.run("doctor", *cluster.arguments).stdout.count(b"mine.yaml") == 0, "nothing is wrong"
    )
    assert data() == {"x": "2"}
    cluster.kubectl("delete", "configmap", "mine")


def test_a_stop_costs_no_pod(cluster: kubernetes.Cluster, archives: Path) -> None:
    image = storeimages.make(archives, 3)
    cluster.kubectl(
        "run", "lasting", f"--image={image.reference}", "--restart=Never", "--command", "--", "/bin/sleep", "1000"
    )  # fmt: skip
    cluster.await_phase("lasting", "Running")
    before = cluster.get("pod", "lasting")["status"]
    # What another machine, or an older nixlet, left on the node.
    (name,) = (node["metadata"]["name"] for node in cluster.get("nodes")["items"])
    stale = ("nixlet.io/strategy-", "runtime.nixlet.io/gone=true", "runtime.nixlet.io/runc=false", "own=kept")
    cluster.kubectl("label", "--overwrite", "node", name, *stale)
    assert cluster.stop() == 0
    assert [pid for pid in nodes.with_descendants(nodes.processes_below(cluster.state_dir)) if is_sleep(pid)]
    # With other settings no start makes another cluster of it.
    for other, sentence in (
        (("--service-cidr", "10.53.0.0/16"), "was made with --service-cidr 10.43.0.0/16"),
        (("--datastore-endpoint", "https://192.0.2.1:2379"), "with --datastore-endpoint it would begin empty"),
    ):
        assert refused(cluster, *other).count(sentence) == 1
    database = cluster.data_dir / "server" / "db" / "etcd"
    away = database.rename(database.with_name("away"))
    assert f"{database}/member is missing" in refused(cluster)
    away.rename(database)
    # New keys of all certificates make no other cluster of it either.
    cluster.ok("certificate", "rotate", "--data-dir", str(cluster.data_dir))
    # Programs may listen elsewhere, a kubelet has more files, and nobody's environment is in etcd's way.
    drop_in = cluster.data_dir / "agent/etc/kubelet.conf.d/50-own.conf"
    drop_in.write_text(f"apiVersion: {KUBELET}\nkind: KubeletConfiguration\ncontainerLogMaxFiles: 7\n")
    cluster.arguments += ["--kube-scheduler-arg", "secure-port=10400", "--kubelet-arg", "healthz-port=10300"]
    cluster.arguments += ["--kube-controller-manager-arg", "bind-address=0.0.0.0"]
    cluster.environment["ETCD_NAME"] = "somebody"
    cluster.start()
    cluster.await_node()

    def labels() -> dict[str, str]:
        return dict(cluster.get("node", name)["metadata"]["labels"])

    kubernetes.until(lambda: labels().get("nixlet.io/strategy") == "view", "the node says what it can do")
    assert labels()["runtime.nixlet.io/runc"] == "true"
    assert labels()["own"] == "kept"
    assert "runtime.nixlet.io/gone" not in labels()
    after = cluster.get("pod", "lasting")["status"]
    assert after["containerStatuses"][0]["containerID"] == before["containerStatuses"][0]["containerID"]
    assert after["containerStatuses"][0]["restartCount"] == 0
    assert after["podIP"] == before["podIP"]
    still_answers(cluster, "lasting")
    configz = f"/api/v1/nodes/node-{cluster.number}/proxy/configz"
    assert json.loads(cluster.kubectl("get", "--raw", configz))["kubeletconfig"]["containerLogMaxFiles"] == 7
    cluster.kubectl("delete", "pod", "lasting", "--now")


def refused(cluster: kubernetes.Cluster, *more: str) -> str:
    """What a start with more arguments prints that comes to nothing."""
    kept, before = list(cluster.arguments), len(cluster.log.read_text())
    cluster.arguments += more
    try:
        assert cluster.launch().wait(60) == 125
    finally:
        cluster.arguments = kept
    return cluster.log.read_text()[before:]


def still_answers(cluster: kubernetes.Cluster, pod: str) -> None:
    """A kubelet that has just started knows its pods a moment later, and the Node object still says what was true before."""

    def answers() -> bool:
        return cluster.kubectl("exec", pod, "--", "/bin/echo", "still", check=False) == "still\n"

    kubernetes.until(answers, f"{pod} answers")


def is_sleep(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"/bin/sleep")
    return False
