"""`nixlet agent` joins a cluster of nixlet's by its token, runs pods of it, and goes on while the server is away."""

import base64
import datetime
import functools
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from nixlet.cluster import certificates, joining, kubeconfigs, signing, standing, tokens
from nixlet.cluster.layout import Layout
from nixlet.host import files
from support import hasty, kubeagents, kubernetes, nodes, parts, storeimages
from support.kubeagents import Agent

pytestmark = pytest.mark.timeout(300)

#: What a node says that waits for its server.
WAITS = "the node waits for its server, which is asked again and again"

HASTY = [sys.executable, hasty.__file__]
CONTAINERD = ("--containerd", str(parts.containerd(parts.CONTAINERDS[-1])))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kubernetes.Cluster]:
    # As kubeadm's clusters have it: what a cluster is is told to everybody, signed by each token.
    signing = ("--kube-controller-manager-arg", "controllers=*,bootstrapsigner,tokencleaner")
    telling = ("--kube-apiserver-arg", "anonymous-auth=true")
    made = kubernetes.Cluster(66, tmp_path_factory.mktemp("server"), *CONTAINERD, *signing, *telling)
    made.wrapper = HASTY
    with kubernetes.cleaned_up(made):
        made.start()
        made.await_node()
        yield made


@pytest.fixture(scope="module")
def agent(cluster: kubernetes.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    made = Agent(67, tmp_path_factory.mktemp("agent"), cluster, *CONTAINERD)
    made.arguments += ["--server", made.server_url, "--token-file", str(made.token_file)]
    with kubeagents.cleaned_up(made):
        made.wrapper += HASTY
        made.start()
        kubernetes.until(made.is_ready, f"the agent is ready: {made.log}")
        yield made


def sleeper(name: str, node: str, image: str) -> bytes:
    return nodes.manifest(name, image, command=["/bin/sleep", "1000"], nodeName=node)


def test_both_nodes_are_of_the_cluster_each_with_its_part_of_the_network(
    cluster: kubernetes.Cluster, agent: Agent
) -> None:
    found = {each["metadata"]["name"]: each for each in cluster.get("nodes")["items"]}
    assert set(found) == {"node-66", agent.name}
    parts_of = [each["spec"]["podCIDR"] for each in found.values()]
    assert len(set(parts_of)) == 2
    addresses = [each["address"] for each in found[agent.name]["status"]["addresses"] if each["type"] == "InternalIP"]
    assert addresses == [agent.address]
    # The cluster's facts, which nobody said on this node.
    config = json.loads(cluster.kubectl("get", "--raw", f"/api/v1/nodes/{agent.name}/proxy/configz"))["kubeletconfig"]
    assert (config["clusterDNS"], config["clusterDomain"]) == (["10.43.0.10"], "cluster.local")


def test_a_pod_of_store_paths_runs_there_and_outlives_the_server_and_the_agent(
    cluster: kubernetes.Cluster, agent: Agent, archives: Path, tmp_path: Path
) -> None:
    image = storeimages.make(archives, 3, salt="agents")
    cluster.kubectl("apply", "-f", "-", stdin=sleeper("there", agent.name, image.reference))
    cluster.await_phase("there", "Running")
    # The server reaches the agent's kubelet, which shows a certificate that the server has made.
    assert cluster.kubectl("exec", "there", "--", "/bin/echo", "inside") == "inside\n"
    before = cluster.get("pod", "there")
    data_dir = ("--data-dir", str(cluster.data_dir))
    token = cluster.ok("token", "create", *data_dir).strip()
    cluster.kubectl("label", "--overwrite", "node", agent.name, "nixlet.io/strategy=other")
    cluster.stop()
    # (whose nodes and pods watch it all the same)
    assert "and was killed" not in cluster.log.read_text()
    assert agent.version()["node"] is not None
    # The agent starts with what it has from before.
    agent.stop()
    agent.start()
    assert "the node starts with what it has from before" in agent.log.read_text()
    # One that has never joined waits.
    other = Agent(68, tmp_path, cluster, *CONTAINERD)
    other.arguments += ["--server", other.server_url, "--token", token]
    with kubeagents.cleaned_up(other):
        process = other.launch()
        kubernetes.until(lambda: WAITS in other.log.read_text(), "it waits")
        cluster.start()
        kubernetes.until(other.is_ready, f"the other agent is ready: {other.log}")
        assert process.poll() is None
        # It stays when its token has ended.
        cluster.ok("token", "delete", token, *data_dir)
        other.await_ready()
        other.stop()
        other.start()
        assert "the token isn't good any more" in other.log.read_text()
        assert token not in other.log.read_text()
    cluster.kubectl("delete", "node", other.name)
    kubernetes.until(agent.is_ready, f"the agent is ready: {agent.log}")
    # It says by itself what it can do, as soon as there is somebody to say it to.
    strategy = functools.partial(cluster.get, "node", agent.name)
    kubernetes.until(lambda: strategy()["metadata"]["labels"]["nixlet.io/strategy"] == "view", "the agent's label")
    after = cluster.get("pod", "there")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert [each["restartCount"] for each in after["status"]["containerStatuses"]] == [0]
    # (a kubelet that has just started has yet to hear of its pods)
    still = ("exec", "there", "--", "/bin/echo", "still")
    kubernetes.until(lambda: cluster.kubectl(*still, check=False) == "still\n", "the pod can be reached")
    cluster.kubectl("delete", "pod", "there", "--now")


def age(pairs: "dict[signing.Pair, signing.Authority]") -> set[int]:
    """Have certificates end in 30 days, each for whom it was and with its key; their numbers."""
    now, numbers = datetime.datetime.now(datetime.UTC), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signing, "LIFE", datetime.timedelta(days=30))
        for pair, authority in pairs.items():
            found, key = signing.read_certificates(pair.certificate), signing.read_key(pair.key)
            assert found
            assert key is not None
            issued = authority.issue(signing.subject_of(found[0]), key.public_key(), now)
            numbers.add(issued[0].serial_number)
            files.write_atomically(pair.certificate, signing.certificates_text(issued))
    return numbers


def days_left(places: Layout) -> int:
    """The days until the first of a node's certificates is to be renewed."""
    now = datetime.datetime.now(datetime.UTC)
    due = standing.renewal(places, now)
    assert due is not None
    return (due - now).days


def served(address: str, port: int) -> int:
    """The number of the certificate that somebody shows."""
    return x509.load_pem_x509_certificate(ssl.get_server_certificate((address, port)).encode()).serial_number


def processes(node: nodes.Node) -> dict[str, int]:
    return {name: child["pid"] for name, child in node.children().items()}


def number(path: str) -> int:
    return x509.load_pem_x509_certificates(Path(path).read_bytes())[0].serial_number


def test_certificates_are_renewed_while_both_run_and_no_pod_notices(
    cluster: kubernetes.Cluster, agent: Agent, archives: Path
) -> None:
    image = storeimages.make(archives, 3, salt="agents")
    cluster.kubectl("apply", "-f", "-", stdin=sleeper("renewed", agent.name, image.reference))
    cluster.await_phase("renewed", "Running")
    server, there = Layout(str(cluster.data_dir), ""), Layout(str(agent.data_dir), "")
    tls = {name: signing.read_authority(signing.Pair.at(server.tls(name))) for name in certificates.NAMES}
    pairs = {each.pair: tls[each.authority] for each in standing.plan(server)}
    pairs |= {signing.Pair.at(there.node(name)): tls[authority] for name, authority in joining.SIGNED_BY.items()}
    shown = {
        (cluster.address, 6443): server.tls("serving-kube-apiserver.crt"),
        (cluster.address, 6444): server.tls("serving-kube-apiserver.crt"),
        (cluster.address, 10250): server.node("serving-kubelet.crt"),
        (agent.address, 10250): there.node("serving-kubelet.crt"),
    }
    started = [processes(node) for node in (cluster, agent)]
    before = {place: served(*place) for place in shown}
    numbers = age(pairs)
    for places in (server, there):
        kubernetes.until(lambda places=places: days_left(places) > 200, "they are renewed")
    assert numbers.isdisjoint(number(pair.certificate) for pair in pairs)
    # Whoever shows them takes them up by itself.
    for place, path in shown.items():
        kubernetes.until(lambda place=place, path=path: served(*place) == number(path), f"{place} shows it")
    assert set(before.values()).isdisjoint(served(*place) for place in shown)
    # What people have is new as well.
    data = kubeconfigs.read(str(cluster.kubeconfig)).credentials.certificate_data
    assert data == Path(server.tls("client-admin.crt")).read_bytes()
    assert cluster.kubectl("exec", "renewed", "--", "/bin/echo", "inside") == "inside\n"
    # With other keys, too.
    cluster.ok("certificate", "rotate", "--data-dir", str(cluster.data_dir))
    for place, path in shown.items():
        kubernetes.until(lambda place=place, path=path: served(*place) == number(path), f"{place} shows it")
    assert cluster.kubectl("exec", "renewed", "--", "/bin/echo", "inside") == "inside\n"
    assert [processes(node) for node in (cluster, agent)] == started
    after = cluster.get("pod", "renewed")["status"]["containerStatuses"]
    assert [each["restartCount"] for each in after] == [0]
    cluster.kubectl("delete", "pod", "renewed", "--now")


def test_certificates_of_both_are_told(cluster: kubernetes.Cluster, agent: Agent) -> None:
    for node, count in ((cluster, 17), (agent, 5)):
        found = json.loads(node.ok("certificate", "check", "--data-dir", str(node.data_dir), "-o", "json"))
        assert (len(found), {each["state"] for each in found}) == (count, {"valid"})


def refused(agent: Agent, *arguments: str) -> str:
    """How an agent ends that isn't let in."""
    agent.arguments += arguments
    process = agent.launch()
    assert process.wait(60) == 125, agent.log.read_text()
    return agent.log.read_text().splitlines()[-2]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda token: f"{token}x", "doesn't let this node in: the token is wrong, or has ended"),
        (lambda token: "K10" + "0" * 64 + token[67:], "has another certificate authority than the one that the token"),
        (lambda token: "K10" + token[3:67] + "::abcdef.0123456789abcdef", "the token is wrong, or has ended"),
    ],
)
def test_who_has_no_good_token_stays_outside(
    cluster: kubernetes.Cluster, tmp_path: Path, change: object, sentence: str
) -> None:
    made = Agent(68, tmp_path, cluster, *CONTAINERD)
    assert callable(change)
    token = change(made.token_file.read_text().strip())
    with kubeagents.cleaned_up(made):
        said = refused(made, "--server", made.server_url, "--token", token)
        assert said.startswith("error: ")
        assert sentence in said
        assert token not in made.log.read_text()


def test_nobody_takes_another_node_s_name(cluster: kubernetes.Cluster, agent: Agent, tmp_path: Path) -> None:
    made = Agent(68, tmp_path, cluster, *CONTAINERD, "--node-name", agent.name)
    with kubeagents.cleaned_up(made):
        said = refused(made, "--server", made.server_url, "--token-file", str(made.token_file))
    assert f"there is a node {agent.name} already" in said


def test_a_server_that_is_not_there(cluster: kubernetes.Cluster, tmp_path: Path) -> None:
    made = Agent(68, tmp_path, cluster, *CONTAINERD)
    made.arguments += ["--server", f"https://{cluster.address}:7443", "--token", "secret"]
    with kubeagents.cleaned_up(made), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(kubernetes.PATIENCE)
        made.environment["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        made.launch()
        while not (said := manager.recv(4096).decode()).startswith("STATUS=the node waits for its server: "):
            assert said != "READY=1"
        assert "nothing listens where the server at" in said
        assert WAITS in made.log.read_text()
        assert made.stop() == 0


@pytest.fixture
def open_to_tokens(cluster: kubernetes.Cluster) -> Iterator[None]:
    """Kubernetes' own way for kubelets, which a server of nixlet's leaves closed: there whoever has a token may be any node."""
    roles = {
        "node-bootstrapper": "system:node-bootstrapper",
        "nodeclient": "system:certificates.k8s.io:certificatesigningrequests:nodeclient",
    }
    for name, role in roles.items():
        who = (f"--clusterrole={role}", "--group=system:bootstrappers")
        cluster.kubectl("create", "clusterrolebinding", name, *who)
    yield
    cluster.kubectl("delete", "clusterrolebinding", *roles)


def test_a_kubelet_waits_until_a_person_lets_it_in(cluster: kubernetes.Cluster, tmp_path: Path) -> None:
    role = ("--clusterrole=system:node-bootstrapper", "--group=system:bootstrappers")
    cluster.kubectl("create", "clusterrolebinding", "askers", *role)
    data_dir = ("--data-dir", str(cluster.data_dir))
    token = tokens.parse(cluster.ok("token", "create", *data_dir).strip())
    authority = (cluster.data_dir / "server/tls/server-ca.crt").read_bytes()
    credentials = kubeconfigs.Credentials(token=token.credentials())
    there = kubeconfigs.Kubeconfig(f"https://{cluster.address}:6443", authority_data=authority, credentials=credentials)
    path = tmp_path / "bootstrap.kubeconfig"
    kubeconfigs.write(str(path), there)
    made = Agent(69, tmp_path, cluster, *CONTAINERD, "--kubeconfig", str(path), "--cluster-dns", "10.43.0.10")
    with kubeagents.cleaned_up(made):
        made.launch()
        waits = "the kubelet waits for its certificate, which the cluster hasn't given it"
        kubernetes.until(lambda: waits in made.log.read_text(), "it is told how a person lets it in")
        assert made.version()["node"] is None
        check = made.run("certificate", "check", "--data-dir", str(made.data_dir))
        assert (check.returncode, b"hasn't given the kubelet its certificate yet" in check.stdout) == (1, True)
        asking = cluster.kubectl("get", "csr", "--output=name").split()
        cluster.kubectl("certificate", "approve", *(each.partition("/")[2] for each in asking))
        made.await_ready()
        kubernetes.until(made.is_ready, f"the agent is ready: {made.log}")
        assert is_the_node_by_its_own_certificate(made)
        check = made.run("certificate", "check", "--data-dir", str(made.data_dir), "-o", "json")
        found = {each["service"]: each["state"] for each in json.loads(check.stdout)}
        assert (check.returncode, found) == (0, {"certificate-authority": "valid", "kubelet": "valid"})
    cluster.kubectl("delete", "clusterrolebinding", "askers")
    cluster.kubectl("delete", "node", made.name)


def is_the_node_by_its_own_certificate(agent: Agent) -> bool:
    own = kubeconfigs.read(str(agent.data_dir / "agent/kubelet.kubeconfig"))
    (certificate, *_) = x509.load_pem_x509_certificates(Path(own.credentials.certificate).read_bytes())
    return certificate.subject.rfc4514_string() == f"CN=system:node:{agent.name},O=system:nodes"


@pytest.mark.usefixtures("open_to_tokens")
def test_a_kubelet_asks_anybody_s_cluster_for_its_certificates(cluster: kubernetes.Cluster, tmp_path: Path) -> None:
    data_dir = ("--data-dir", str(cluster.data_dir))
    token = tokens.parse(cluster.ok("token", "create", *data_dir).strip())
    authority = (cluster.data_dir / "server/tls/server-ca.crt").read_bytes()
    credentials = kubeconfigs.Credentials(token=token.credentials())
    server = f"https://{cluster.address}:6443"
    path = tmp_path / "bootstrap.kubeconfig"
    kubeconfigs.write(str(path), kubeconfigs.Kubeconfig(server, authority_data=authority, credentials=credentials))
    made = Agent(69, tmp_path, cluster, *CONTAINERD, "--kubeconfig", str(path), "--cluster-dns", "10.43.0.10")
    with kubeagents.cleaned_up(made):
        made.start()
        kubernetes.until(made.is_ready, f"the agent is ready: {made.log}")
        assert is_the_node_by_its_own_certificate(made)
        assert set(made.children()) == {"containerd", "kubelet"}
        # Without the token it goes on with what it has.
        cluster.ok("token", "delete", token.user, *data_dir)
        made.stop()
        made.start()
        kubernetes.until(made.is_ready, f"the agent is ready: {made.log}")


@pytest.fixture
def told_to_everybody(cluster: kubernetes.Cluster) -> Iterator[None]:
    """What ``kubeadm init`` leaves for those who have a token."""
    authority = (cluster.data_dir / "server/tls/server-ca.crt").read_bytes()
    there = {
        "server": f"https://{cluster.address}:6443",
        "certificate-authority-data": base64.b64encode(authority).decode(),
    }
    info = json.dumps({"apiVersion": "v1", "kind": "Config", "clusters": [{"name": "", "cluster": there}]})
    wanted = "clusterDNS: [10.43.0.10]\nclusterDomain: example.org\n"
    public, system = ("--namespace=kube-public",), ("--namespace=kube-system",)
    for namespace, name, key, value, who in (
        (public, "cluster-info", "kubeconfig", info, "--user=system:anonymous"),
        (system, "kubelet-config", "kubelet", wanted, "--group=system:bootstrappers"),
    ):
        cluster.kubectl("create", "configmap", name, *namespace, f"--from-literal={key}={value}")
        rule = ("--verb=get", "--resource=configmaps", f"--resource-name={name}")
        cluster.kubectl("create", "role", name, *namespace, *rule)
        cluster.kubectl("create", "rolebinding", name, *namespace, f"--role={name}", who)
    yield
    for namespace, name in ((public, "cluster-info"), (system, "kubelet-config")):
        cluster.kubectl("delete", f"configmap/{name}", f"role/{name}", f"rolebinding/{name}", *namespace)


@pytest.mark.usefixtures("open_to_tokens", "told_to_everybody")
def test_anybody_s_cluster_is_joined_by_a_token_as_kubeadm_makes_them(
    cluster: kubernetes.Cluster, tmp_path: Path
) -> None:
    printed = cluster.ok("token", "create", "--data-dir", str(cluster.data_dir)).strip()
    token = tokens.parse(printed).credentials()
    signature = f"jsonpath={{.data.jws-kubeconfig-{token.partition('.')[0]}}}"
    asked = ("get", "configmap", "cluster-info", "--namespace=kube-public", "-o", signature)
    kubernetes.until(lambda: cluster.kubectl(*asked), "the token has signed")
    made = Agent(69, tmp_path, cluster, *CONTAINERD)
    made.arguments += ["--server", made.server_url, "--token", token]
    with kubeagents.cleaned_up(made):
        # To this one it looks like a cluster at which nobody joins as nixlet's nodes do.
        rule = ["OUTPUT", "-p", "tcp", "--dport", "6444", "-j", "REJECT", "--reject-with", "tcp-reset"]
        inside = ["nsenter", f"--net=/run/netns/{made.namespace}"]
        subprocess.run([*inside, "iptables", "-A", *rule], check=True)
        made.start()
        kubernetes.until(made.is_ready, f"the agent is ready: {made.log}")
        assert is_the_node_by_its_own_certificate(made)
        # What the cluster wants of its kubelets.
        written = made.data_dir / "agent/etc/kubelet.conf.d/00-nixlet-defaults.conf"
        assert "example.org" in written.read_text()
        # Also when the token has ended, by which it was told.
        cluster.ok("token", "delete", "--data-dir", str(cluster.data_dir), token.partition(".")[0])
        made.stop()
        made.start()
        assert "example.org" in written.read_text()
        assert token.partition(".")[2] not in made.log.read_text()


def test_authorities_that_a_person_replaces(cluster: kubernetes.Cluster, agent: Agent, archives: Path) -> None:
    """As docs/k3s.md says it in place of k3s's ``certificate rotate-ca``. The last one here: agents before it have another token."""
    image = storeimages.make(archives, 3, salt="agents")
    cluster.kubectl("apply", "-f", "-", stdin=sleeper("stays", agent.name, image.reference))
    cluster.await_phase("stays", "Running")
    before = cluster.get("pod", "stays")["status"]["containerStatuses"][0]["containerID"]
    places = Layout(str(cluster.data_dir), "")
    former = agent.token_file.read_text()
    agent.stop()
    cluster.stop()
    for name in (certificates.CLIENT, certificates.SERVER):
        key = signing.new_key()
        made = signing.make_authority("another", key, datetime.datetime.now(datetime.UTC))
        signing.write_key(places.tls(f"{name}.key"), key)
        files.write_atomically(places.tls(f"{name}.crt"), signing.certificates_text([made]))
    cluster.start()
    assert agent.token_file.read_text() != former
    agent.start()
    kubernetes.until(agent.is_ready, f"the agent is ready: {agent.log}")
    still = ("exec", "stays", "--", "/bin/echo", "still")
    kubernetes.until(lambda: cluster.kubectl(*still, check=False) == "still\n", "the pod can be reached")
    after = cluster.get("pod", "stays")["status"]["containerStatuses"][0]["containerID"]
    assert after == before
    cluster.kubectl("delete", "pod", "stays", "--now")
