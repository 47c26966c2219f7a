"""What Kubernetes' documentation says of pods, on images of store paths, with the real kubelet; and many of them.

``NIXLET_PODS=100`` makes it long.
"""

import contextlib
import functools
import json
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nixlet.host import mounts
from support import caches, footprint, kubernetes, nixstore, objects, parts, storeimages, terminals

pytestmark = pytest.mark.timeout(600)

REPLICAS = 20

#: Pods of one closure at a time.
PODS = int(os.environ.get("NIXLET_PODS", "20"))

#: A page that says which pod it is from.
SERVE = "/bin/busybox mkdir /www && echo $HOSTNAME >/www/index.html && exec /bin/busybox httpd -f -p 8080 -h /www"

#: Waits for a signal.
WAIT = "while true; do /bin/sleep 1 & wait $!; done"

#: A server that answers with the name of its pod, without rights, and without a root to write to but for /tmp.
NGINX = """
daemon off; pid /tmp/pid; error_log stderr;
events {}
http {
  access_log off;
  client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy; fastcgi_temp_path /tmp/fastcgi; uwsgi_temp_path /tmp/uwsgi;
  scgi_temp_path /tmp/scgi;
  server { listen 8080; location / { return 200 "$hostname\\n"; } }
}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[caches.Cache]:
    with caches.running(tmp_path_factory.mktemp("cache") / "paths") as made:
        yield made


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, cache: caches.Cache) -> Iterator[kubernetes.Cluster]:
    containerd = ("--containerd", str(parts.containerd(parts.CONTAINERDS[-1])))
    made = kubernetes.Cluster(69, tmp_path_factory.mktemp("pods"), *containerd, "--kubelet-arg", "max-pods=130")
    made.environment["NIX_CONFIG"] = cache.nix_config
    with kubernetes.cleaned_up(made):
        made.start()
        made.await_node()
        yield made


@pytest.fixture(scope="module")
def image(archives: Path) -> str:
    return storeimages.make(archives, 5).reference


def printed(cluster: kubernetes.Cluster, *made: objects.Object) -> str:
    """What the last of some objects, a pod, prints before it succeeds."""
    cluster.apply(*made)
    name = made[-1]["metadata"]["name"]
    cluster.await_phase(name, "Succeeded")
    return cluster.kubectl("logs", name, "-c", "main")


def test_many_pods_of_a_real_server_behind_a_service(cluster: kubernetes.Cluster, archives: Path) -> None:
    """Debian's nginx from the store, by a user of its own, with its configuration from the cluster; Debian's curl asks it by its name."""
    nginx, curl = storeimages.program("/usr/sbin/nginx"), storeimages.program("/usr/bin/curl")
    made = storeimages.make(archives, 1, salt="-nginx", also=[nginx.package, curl.package])
    container = {
        "image": made.reference,
        "command": [*nginx.argv, "-e", "stderr", "-c", "/conf/nginx.conf"],
        "securityContext": {"runAsUser": 1234, "runAsNonRoot": True},
        "readinessProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1},
        "volumeMounts": [{"name": "conf", "mountPath": "/conf"}, {"name": "tmp", "mountPath": "/tmp"}],
    }
    volumes = [{"name": "conf", "configMap": {"name": "nginx"}}, {"name": "tmp", "emptyDir": {}}]
    cluster.await_dns()
    begun = time.monotonic()
    cluster.apply(
        objects.config_map("nginx", **{"nginx.conf": NGINX}),
        objects.deployment("many", REPLICAS, container, volumes=volumes, terminationGracePeriodSeconds=1),
        objects.service("many", [{"port": 80, "targetPort": 8080}], type="NodePort"),
    )
    kubernetes.until(lambda: ready(cluster) == REPLICAS, "all replicas are ready")
    print(f"{REPLICAS} replicas ready after {time.monotonic() - begun:.1f} s")
    pods = cluster.get("pods", "-l", "app=many")["items"]
    names = {each["metadata"]["name"] for each in pods}
    assert len({each["status"]["podIP"] for each in pods}) == REPLICAS
    # (kube-proxy follows a moment later)
    kubernetes.until(lambda: len(led_to("many")) == REPLICAS, "the service leads to all")
    found = cluster.get("service", "many")["spec"]
    address, port = found["clusterIP"], found["ports"][0]["nodePort"]
    # From the node, by the service's address and by the node's own port.
    for url in (f"http://{address}/", f"http://{cluster.address}:{port}/"):
        answered = [fetched(url) for _ in range(60)]
        assert set(answered) <= names, url
        assert len(set(answered)) > REPLICAS // 2, url
    # From another pod by the service's name, and from pods of its own: sometimes a pod is handed to itself.
    cluster.apply(objects.pod("asking", made.reference, "exec /bin/sleep 1000"))
    cluster.await_phase("asking", "Running")
    ask = [*curl.argv, "-sS", "--max-time", "30", "-H", "Connection: close"]
    for asking, host in (
        ("asking", "many"),
        ("asking", "many.default.svc.cluster.local"),
        *((name, address) for name in sorted(names)[:4]),
    ):
        answered = cluster.kubectl("exec", asking, "--", *ask, f"http://{host}/?[1-20]").split()
        assert len(answered) == 20, asking
        assert set(answered) <= names
        assert len(set(answered)) > 3
    cluster.kubectl("delete", "deployment/many", "service/many", "configmap/nginx")
    cluster.kubectl("delete", "pod", "asking", "--now")
    kubernetes.until(lambda: not cluster.get("pods", "-l", "app=many")["items"], "all replicas are gone")


def ready(cluster: kubernetes.Cluster) -> int:
    found: int = cluster.get("deployment", "many")["status"].get("readyReplicas", 0)
    return found


def led_to(service: str) -> set[str]:
    """Where kube-proxy leads those who ask a service."""
    return {each.partition(" to ")[2] for each in footprint.service_rules() if f"-default/{service}/" in each} - {""}


def fetched(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: bytes = answer.read()
    return text.decode().strip()


@pytest.mark.timeout(900)
def test_a_crowd_costs_a_mount_each_and_leaves_nothing(cluster: kubernetes.Cluster, archives: Path) -> None:
    """The hundredth pod is no more than the first: `scripts/bench podcrowd` has the times."""
    count = PODS
    made = storeimages.make(archives, 300, salt="-crowd")
    logs = count > 20  # (a kubelet takes a minute to remove them)
    # The cluster's own pod, which comes with the cluster and stays.
    cluster.await_dns()
    before = footprint.of(cluster, logs=logs)
    begun = time.monotonic()
    cluster.apply(objects.sleepers("crowd", made.reference, count))
    cluster.kubectl("expose", "deployment/crowd", "--port=80")
    cluster.kubectl("rollout", "status", "deployment/crowd", "--timeout=300s")
    print(f"{count} pods ran after {time.monotonic() - begun:.1f} s")
    kubernetes.until(lambda: len(led_to("crowd")) == count, "the service leads to all")
    new = footprint.more(footprint.of(cluster, logs=logs), before)
    # Of a pod: its container's root, its sandbox's, that one's shared memory and network namespace, and its token.
    views = [place for place in new["mounts"] if "/views/" in place]
    roots = [place for place in new["mounts"] if place.endswith("/rootfs")]
    assert (len(views), len(roots), len(new["mounts"])) == (1, 2 * count, 5 * count + 1)
    table = {entry.path: entry.options for entry in mounts.below(str(cluster.state_dir))}
    shown = [re.findall(r"/views/(\d+)/", table[place]) for place in roots]
    assert sorted(map(len, map(set, shown))) == [0] * count + [1] * count
    assert len({number for found in shown for number in found}) == 1
    # The image's layer; of a pod: its container's and its sandbox's.
    assert (len(new["snapshots"]), len(new["containers"])) == (2 * count + 1, 2 * count)
    assert (len(new["bridge ports"]), len(new["addresses"])) == (count, count)
    cluster.kubectl("delete", "service/crowd")
    # (with its pods)
    cluster.kubectl("delete", "deployment/crowd", "--cascade=foreground", "--timeout=300s")
    footprint.await_no_more_containers(cluster, before)
    # The last image that had the closure.
    cluster.crictl("rmi", made.reference)
    deadline = time.monotonic() + 2 * kubernetes.PATIENCE
    while left := footprint.more(footprint.of(cluster, logs=logs), before):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def test_a_rolling_update_fetches_what_is_new_alone(
    cluster: kubernetes.Cluster, archives: Path, cache: caches.Cache
) -> None:
    salt = "-rolling"
    old, new = (storeimages.make(archives, count, salt=salt) for count in (50, 53))
    assert set(old.paths) < set(new.paths)
    added = sorted({*new.paths, new.info} - {*old.paths, old.info})
    assert len(added) == 4
    cache.take(*new.paths, new.info, old.info)
    nixstore.delete(old.info, new.info, *new.paths)
    cluster.apply(objects.sleepers("rolling", old.reference, 4))
    status = ("rollout", "status", "deployment/rolling", "--timeout=120s")
    cluster.kubectl(*status)
    assert sorted(cache.fetched) == sorted([*old.paths, old.info])
    cache.fetched.clear()
    cluster.kubectl("set", "image", "deployment/rolling", f"main={new.reference}")
    cluster.kubectl(*status)
    assert sorted(cache.fetched) == added
    pulls = re.findall(
        r"pulled (\S+?)(?::latest)? in \d+ ms: (\d+) store paths, (\d+) of them fetched", cluster.log.read_text()
    )
    ours = [(reference, paths, fetched) for reference, paths, fetched in pulls if salt in reference]
    # Each pod asks for its image; the first of them alone has something fetched.
    assert sorted(each for each in ours if each[2] != "0") == [
        (old.reference, "50", str(len(old.paths) + 1)),
        (new.reference, "53", "4"),
    ]
    assert len(ours) == 8
    pods = [
        each
        for each in cluster.get("pods", "-l", "app=rolling")["items"]
        if "deletionTimestamp" not in each["metadata"]
    ]
    assert [each["spec"]["containers"][0]["image"] for each in pods] == [new.reference] * 4
    cluster.kubectl("delete", "deployment/rolling")


def test_init_containers_come_first_and_sidecars_stay(cluster: kubernetes.Cluster, image: str) -> None:
    mount = [{"name": "shared", "mountPath": "/shared"}]
    say = "echo {} >>/shared/said"
    inits = [
        {"name": "first", "image": image, "command": ["/bin/sh", "-c", say.format("first")], "volumeMounts": mount},
        {
            "name": "beside",
            "image": image,
            # What comes after it would come first, but for its probe; it ends when all others have.
            "command": [
                "/bin/sh",
                "-c",
                f"trap 'exec /bin/echo ended' TERM; /bin/sleep 2; {say.format('beside')}; {WAIT}",
            ],
            "volumeMounts": mount,
            "restartPolicy": "Always",
            "startupProbe": {
                "exec": {"command": ["/bin/busybox", "grep", "beside", "/shared/said"]},
                "periodSeconds": 1,
                "failureThreshold": 60,
            },
        },
        {"name": "second", "image": image, "command": ["/bin/sh", "-c", say.format("second")], "volumeMounts": mount},
    ]
    made = objects.pod(
        "inits",
        image,
        "/bin/cat /shared/said",
        container={"volumeMounts": mount},
        initContainers=inits,
        volumes=[{"name": "shared", "emptyDir": {}}],
    )
    made["spec"]["terminationGracePeriodSeconds"] = 30
    assert printed(cluster, made) == "first\nbeside\nsecond\n"
    logs = ("logs", "inits", "-c", "beside")
    kubernetes.until(lambda: cluster.kubectl(*logs) == "ended\n", "the sidecar was ended")


def test_volumes_of_the_cluster_s_objects(cluster: kubernetes.Cluster, image: str) -> None:
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"a": "1", "b": "2"}}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hidden"}, "stringData": {"key": "s3"}}
    sources = [
        {"configMap": {"name": "settings", "items": [{"key": "a", "path": "deep/a"}]}},
        {"secret": {"name": "hidden"}},
        {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}},
    ]
    script = "cd /all; cat deep/a key labels; echo; read -r t <token; echo ${#t}; cat /one; echo $FROM $NODE $LIMIT; ls /var/run/secrets/kubernetes.io/serviceaccount"
    environment = [
        {"name": "FROM", "valueFrom": {"secretKeyRef": {"name": "hidden", "key": "key"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}}},
    ]
    made = objects.pod(
        "volumes",
        image,
        script,
        container={
            "volumeMounts": [
                {"name": "all", "mountPath": "/all"},
                {"name": "settings", "mountPath": "/one", "subPath": "b"},
            ],
            "env": environment,
            "resources": {"limits": {"memory": "64Mi"}},
        },
        volumes=[
            {"name": "all", "projected": {"sources": sources}},
            {"name": "settings", "configMap": {"name": "settings"}},
        ],
    )
    first, *rest = printed(cluster, settings, secret, made).splitlines()
    assert first == '1s3case="volumes"'
    assert int(rest[0]) > 500
    assert rest[1:] == ["2s3 node-69 67108864", "ca.crt", "namespace", "token"]


def test_hosts_names_and_users(cluster: kubernetes.Cluster, image: str) -> None:
    script = "cat /etc/hosts; cat /etc/resolv.conf; cat /etc/hostname; busybox id -u; busybox id -g; busybox id -G; cat /owned/f 2>&1; echo x >/owned/f; ls -ln /owned | busybox tail -n 1"
    made = objects.pod(
        "names",
        image,
        f"PATH=/bin; {script}",
        **objects.mounted("owned", {"emptyDir": {}}),
        hostAliases=[{"ip": "192.0.2.9", "hostnames": ["far.example"]}],
        dnsPolicy="None",
        dnsConfig={
            "nameservers": ["192.0.2.53"],
            "searches": ["a.example"],
            "options": [{"name": "ndots", "value": "3"}],
        },
        hostname="chosen",
        subdomain="below",
        securityContext={"runAsUser": 1234, "runAsGroup": 2345, "fsGroup": 3456, "runAsNonRoot": True},
    )
    found = printed(cluster, made)
    for line in ("192.0.2.9\tfar.example", "nameserver 192.0.2.53", "search a.example", "options ndots:3"):
        assert line in found.splitlines(), found
    assert re.search(r"\tchosen\.below\.default\.svc\.cluster\.local\tchosen\n", found)
    tail = found.splitlines()[-6:]
    assert tail[:3] == ["chosen", "1234", "2345"]
    assert set(tail[3].split()) == {"2345", "3456"}
    assert tail[5].split()[2:4] == ["1234", "3456"]


def test_limits_are_the_cgroup_s(cluster: kubernetes.Cluster, image: str) -> None:
    script = "cd /sys/fs/cgroup; cat memory.max cpu.max 2>/dev/null || cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us pids/pids.max"
    limits = {"memory": "96Mi", "cpu": "250m"}
    made = objects.pod("limits", image, f"PATH=/bin; {script}", container={"resources": {"limits": limits}})
    memory, quota, period, *_ = printed(cluster, made).split()
    assert int(memory) == 96 << 20
    assert int(quota) / int(period) == 0.25
    assert cluster.get("pod", "limits")["status"]["qosClass"] == "Guaranteed"


def test_a_pod_that_needs_too_much_memory_is_ended(cluster: kubernetes.Cluster, image: str) -> None:
    made = objects.pod(
        "greedy", image, "exec /bin/busybox tail /dev/zero", container={"resources": {"limits": {"memory": "32Mi"}}}
    )
    cluster.apply(made)
    cluster.await_phase("greedy", "Failed")
    ended = cluster.get("pod", "greedy")["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137)


def test_probes_hooks_and_restarts(cluster: kubernetes.Cluster, image: str) -> None:
    """Until it has started nobody asks whether it is ready or alive; it is ended with its hook, and started again, when it isn't alive."""

    def by(script: str) -> objects.Object:
        return {"exec": {"command": ["/bin/sh", "-c", script]}}

    container = {
        "volumeMounts": [{"name": "kept", "mountPath": "/kept"}],
        "startupProbe": {**by("test -e /started"), "periodSeconds": 1, "failureThreshold": 120},
        "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1},
        "livenessProbe": {**by("test -e /alive"), "periodSeconds": 1, "failureThreshold": 1},
        "lifecycle": {"postStart": by("echo hooked >/hooked"), "preStop": by("echo $HOSTNAME stopped >/kept/last")},
    }
    volumes = [{"name": "kept", "emptyDir": {}}]
    cluster.apply(objects.pod("probed", image, SERVE, container=container, restartPolicy="Always", volumes=volumes))

    def status() -> dict[str, Any]:
        found: list[dict[str, Any]] = cluster.get("pod", "probed")["status"].get("containerStatuses", [{}])
        return found[0]

    def inside(script: str) -> str:
        return cluster.kubectl("exec", "probed", "--", "/bin/sh", "-c", script, check=False)

    cluster.await_phase("probed", "Running")
    kubernetes.until(
        lambda: inside("busybox wget -qO - 127.0.0.1:8080; cat /hooked") == "probed\nhooked\n", "it serves"
    )
    # It isn't alive, and nobody asks.
    time.sleep(3)
    assert (status()["started"], status()["ready"], status()["restartCount"]) == (False, False, 0)
    inside("echo >/alive; echo >/started")
    kubernetes.until(lambda: status()["ready"], "it is ready")
    assert status()["restartCount"] == 0
    inside("busybox rm /alive")
    kubernetes.until(lambda: status()["restartCount"] == 1 and "running" in status()["state"], "it was started again")
    # In a root as new as at its first start.
    look, seen = "cat /kept/last /hooked; test -e /started || echo not started", "probed stopped\nhooked\nnot started\n"
    kubernetes.until(lambda: inside(look) == seen, "both hooks were called, in roots of their own")
    cluster.kubectl("delete", "pod", "probed", "--now")


#: A pod that answers what it is told, and has what `kubectl cp` looks for.
ANSWER = (
    "/bin/busybox mkdir /more; /bin/busybox ln -s /bin/busybox /more/tar; while read -r line; do echo heard $line; done"
)


def test_streams_of_a_pod(cluster: kubernetes.Cluster, image: str, tmp_path: Path) -> None:
    """exec with input and exit status, and at a terminal; attach, cp, port-forward, and a container that joins later."""
    environment = [{"name": "PATH", "value": "/bin:/more"}]
    container = {"stdin": True, "env": environment}
    made = objects.pod("streams", image, ANSWER, container=container)
    made["spec"]["containers"].append({"name": "web", "image": image, "command": ["/bin/sh", "-c", SERVE]})
    cluster.apply(made)
    cluster.await_phase("streams", "Running")
    kubectl = cluster.administrator
    into = ("-c", "main", "streams", "--")
    assert cluster.kubectl("exec", "-i", *into, "/bin/cat", stdin=b"through\n") == "through\n"
    ended = subprocess.run([*kubectl, "exec", *into, "/bin/sh", "-c", "exit 7"], capture_output=True, check=False)
    assert ended.returncode == 7
    with terminals.started([*kubectl, "exec", "-it", *into, "/bin/sh"], dict(os.environ)) as terminal:
        terminal.wait_for(b"# ")
        terminal.press(b"busybox stty size\r")
        terminal.wait_for(b"\r\n25 80\r\n")
        terminal.resize(101, 33)
        terminal.press(b"until busybox stty size | busybox grep '33 101'; do sleep 0.05; done; exit 9\r")
        terminal.wait_for(b"\r\n33 101\r\n")
        assert terminal.end() == 9
    with contextlib.ExitStack() as stack:
        attached = started(stack, *kubectl, "attach", "-qi", "-c", "main", "streams")
        assert attached.stdin is not None
        attached.stdin.write("over here\n")
        attached.stdin.flush()
        assert attached.stdout is not None
        assert attached.stdout.readline() == "heard over here\n"
        forwarding = started(stack, *kubectl, "port-forward", "streams", ":8080")
        assert forwarding.stdout is not None
        match = re.search(r"127\.0\.0\.1:(\d+)", forwarding.stdout.readline())
        assert match is not None
        assert fetched(f"http://127.0.0.1:{match[1]}/") == "streams"
    there, back = tmp_path / "there", tmp_path / "back"
    (there / "deep").mkdir(parents=True)
    (there / "deep" / "file").write_bytes(os.urandom(300_000))
    cluster.kubectl("cp", "-c", "main", str(there), "streams:/copied")
    assert cluster.kubectl("exec", *into, "/bin/ls", "/copied/deep") == "file\n"
    cluster.kubectl("cp", "-c", "main", "streams:/copied/deep", str(back))
    assert (back / "file").read_bytes() == (there / "deep" / "file").read_bytes()
    cluster.kubectl("debug", "streams", f"--image={image}", "--container=later", "--", "/bin/sh", "-c", "echo joined")
    kubernetes.until(functools.partial(said, cluster, "later", "joined\n"), "the later container has said so")
    cluster.kubectl("delete", "pod", "streams", "--now")


def started(stack: contextlib.ExitStack, *argv: str) -> "subprocess.Popen[str]":
    """A program that somebody talks to, until ``stack`` is left."""
    # (who waits for what it doesn't say learns that)
    waiting, pipe = ["timeout", str(kubernetes.PATIENCE), *argv], subprocess.PIPE
    process = stack.enter_context(subprocess.Popen(waiting, stdin=pipe, stdout=pipe, text=True))
    stack.callback(process.terminate)
    return process


def said(cluster: kubernetes.Cluster, container: str, wanted: str) -> bool:
    return cluster.kubectl("logs", "streams", "-c", container, check=False) == wanted


def test_a_static_pod(cluster: kubernetes.Cluster, image: str) -> None:
    file = cluster.data_dir / "agent" / "pod-manifests" / "static.json"
    made = objects.pod("static", image, "echo standing; exec /bin/sleep 1000", restartPolicy="Always")
    file.write_text(json.dumps(made))
    name = "static-node-69"
    kubernetes.until(lambda: cluster.kubectl("logs", name, check=False) == "standing\n", "the static pod runs")
    file.unlink()
    kubernetes.until(
        lambda: name not in cluster.kubectl("get", "pods", "--output=name"), "the static pod goes with its file"
    )
