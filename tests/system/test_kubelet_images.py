"""The image service as a real kubelet uses it, without a cluster: static pods on Nix images and on ordinary ones."""

import asyncio
import base64
import contextlib
import functools
import http.server
import json
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from grpclib.exceptions import GRPCError

from nixlet import errors
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import cri_grpc
from nixlet.rpc.gen import cri_pb2 as pb
from support import image_archives, kubelets, nixstore, nodes, parts, registries, storeimages

#: The registry of these tests, which wants a login, and a name for what it has.
PORT = 5985
LOCKED = f"127.0.0.1:{PORT}/proj/locked"

#: The name of an image that is there without a registry.
SHORT = "docker.io/library/kubelet-short:1"

#: The programs of an image's busybox.
APPLETS = ("sh", "sleep", "ls", "cat", "true", "echo", "find", "readlink")

CREDENTIALS = f"{registries.USER}:{registries.PASSWORD}"


@pytest.fixture(scope="module")
def image(archives: Path) -> storeimages.StoreImage:
    return storeimages.make(archives, 7, salt="kubelet")


@pytest.fixture(scope="module")
def in_store(image: storeimages.StoreImage) -> Iterator[str]:
    """The reference of the same image where its archive is a store path."""
    argv = ["nix-store", "--add", str(image.archive)]
    path = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    yield f"nix:0{path}"
    nixstore.delete(path)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, ordinary: Path) -> Iterator[registries.Registry]:
    with registries.running(tmp_path_factory.mktemp("registry"), PORT, login=True) as made:
        made.push(ordinary, "proj/locked:1", "--dest-creds", CREDENTIALS)
        yield made


@pytest.fixture
def kubelet(node: nodes.Node, tmp_path: Path) -> Iterator[kubelets.Kubelet]:
    with kubelets.running(node, tmp_path / "kubelet") as made:
        yield made


def pod(name: str, images: Mapping[str, str], policy: str, **spec: Any) -> bytes:
    """A pod with a container for each image, which prints its own name and ends."""
    containers = [
        {
            "name": container,
            "image": reference,
            "imagePullPolicy": policy,
            "command": ["/bin/echo", f"this is {container}"],
        }
        for container, reference in images.items()
    ]
    more = {"hostNetwork": True, "restartPolicy": "Never", "automountServiceAccountToken": False, **spec}
    return json.dumps(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"containers": containers, **more}}
    ).encode()


def digest_of(node: nodes.Node, reference: str) -> str:
    (digest,) = json.loads(node.crictl("inspecti", reference))["status"]["repoDigests"]
    return str(digest)


def run(kubelet: kubelets.Kubelet, node: nodes.Node, name: str, images: Mapping[str, str], policy: str) -> list[str]:
    """Have a pod run to its end; the images that were pulled for it."""
    played = kubelet.play(pod(name, images, policy))
    for container in images:
        assert kubelet.until_ended(played, node, container) == f"this is {container}\n"
    kubelet.withdraw(played)
    pulls = [event.message for event in kubelet.events(played) if event.reason == "Pulling"]
    return [message.split('"')[1] for message in pulls]


@pytest.fixture
def there(
    node: nodes.Node, image: storeimages.StoreImage, in_store: str, registry: registries.Registry, ordinary: Path
) -> Iterator[dict[str, str]]:
    """References of all kinds, of images that are there though no kubelet pulled them."""
    for each in (image.reference, in_store):
        node.crictl("pull", each)
    node.crictl("pull", "--creds", CREDENTIALS, f"{LOCKED}:1")
    node.ok("image", "load", "--ref", SHORT, str(ordinary))
    by_digest = digest_of(node, f"{LOCKED}:1")
    yield {
        "archive": image.reference,
        "latest": f"{image.reference}:latest",
        "in-store": in_store,
        "tag": f"{LOCKED}:1",
        "digest": by_digest,
        "both": f"{LOCKED}:1@{by_digest.partition('@')[2]}",
        "short": "kubelet-short:1",
        "library": "library/kubelet-short:1",
        "long": SHORT,
    }
    for each in (image.reference, in_store, f"{LOCKED}:1", SHORT):
        with contextlib.suppress(AssertionError):
            node.crictl("rmi", each)


def test_what_is_there_is_found_by_the_pods_own_reference(
    kubelet: kubelets.Kubelet, node: nodes.Node, there: dict[str, str]
) -> None:
    assert run(kubelet, node, "never", there, "Never") == []
    assert run(kubelet, node, "if-not-present", there, "IfNotPresent") == []


def test_what_a_kubelet_pulled_it_does_not_pull_again(
    kubelet: kubelets.Kubelet, node: nodes.Node, image: storeimages.StoreImage, in_store: str
) -> None:
    """It keeps a record for each image's ID, with the names by which it pulled that: also over its own restart."""
    images = {"archive": image.reference, "latest": f"{image.reference}:latest", "in-store": in_store}
    # Both references lead to one image, and each has to be proven by a pull of its own.
    wanted = [image.reference, in_store]
    assert run(kubelet, node, "first", images, "IfNotPresent") == wanted
    pulled = kubelet.directory / "root" / "image_manager" / "pulled"
    records = {file.name: json.loads(file.read_text()) for file in pulled.iterdir()}
    assert [record["imageRef"] for record in records.values()] == [
        json.loads(node.crictl("inspecti", in_store))["status"]["id"]
    ]
    assert run(kubelet, node, "second", images, "IfNotPresent") == []
    kubelet.stop()
    kubelet.start()
    assert run(kubelet, node, "third", images, "IfNotPresent") == []
    assert run(kubelet, node, "fourth", images, "Never") == []
    assert len(run(kubelet, node, "fifth", images, "Always")) == 3
    # What a kubelet has no place for stands in the node's log.
    assert f"pulled {image.reference}:latest in " in node.log.read_text()
    assert {file.name for file in pulled.iterdir()} == records.keys()
    node.crictl("rmi", image.reference)


def test_what_is_not_there_is_said(
    kubelet: kubelets.Kubelet, node: nodes.Node, archives: Path, registry: registries.Registry
) -> None:
    missing = f"nix:0/nix/store/{'0' * 32}-nix-image-absent.tar"
    played = kubelet.play(pod("absent", {"main": missing}, "Never"))
    said = kubelet.until_said(played, "ErrImageNeverPull")
    assert said == f'Container image "{missing}" is not present with pull policy of Never'
    played = kubelet.play(pod("absent-archive", {"main": f"nix:0{archives}/absent.tar"}, "IfNotPresent"))
    said = next(each.message for each in [kubelets.Event(played, "", kubelet.until_said(played, "Failed"))])
    assert f"there is no image archive {archives}/absent.tar; hint: an archive must be" in said
    assert "\n" not in said
    played = kubelet.play(pod("tagged", {"main": f"nix:0{archives}/absent.tar:1.0"}, "IfNotPresent"))
    assert "nix:0 references have no tag but latest; hint: write" in kubelet.until_said(played, "InspectFailed")
    played = kubelet.play(pod("locked", {"main": f"{LOCKED}:1"}, "Always"))
    assert "authorization failed" in kubelet.until_said(played, "Failed") or "401" in kubelet.until_said(
        played, "Failed"
    )


async def answered(socket: Path, method: str, reference: str) -> tuple[str, str]:
    """What an image service says to a question about a reference: a status and its words, or its answer."""
    spec = pb.ImageSpec(image=reference)
    requests = {
        "ListImages": pb.ListImagesRequest(filter=pb.ImageFilter(image=spec)),
        "ImageStatus": pb.ImageStatusRequest(image=spec, verbose=True),
        "PullImage": pb.PullImageRequest(image=spec),
        "RemoveImage": pb.RemoveImageRequest(image=spec),
    }
    async with channels.connect(str(socket)) as channel:
        try:
            answer = await getattr(cri_grpc.ImageServiceStub(channel), method)(requests[method])
        except GRPCError as error:
            return error.status.name, error.message or ""
    if method == "ListImages":
        return "OK", " ".join(sorted(image.id for image in answer.images))
    return "OK", str(answer)


def test_what_is_no_nix_image_is_answered_as_containerd_does(node: nodes.Node, ordinary: Path) -> None:
    """Each question once to each: the same status, in the same words."""
    node.ok("image", "load", "--ref", SHORT, str(ordinary))
    identity = json.loads(node.crictl("inspecti", SHORT))["status"]["id"]
    names = ["", "kubelet-short:1", SHORT, "absent:1", identity, identity[:20], identity.partition(":")[2][:12]]
    strange = ["UPPER/x", "a b", "x" * 5000, f"sha256:{'0' * 64}", "0" * 64, "nix:0relative"]
    asked = {
        "ListImages": names,
        "ImageStatus": [*names, *strange],
        # One that listens nowhere, and those that no registry is asked for.
        "PullImage": ["", "a b", "127.0.0.1:9/absent:1", f"127.0.0.1:9/{'x' * 300}"],
        "RemoveImage": ["", "absent:1", *strange],
    }
    for method, references in asked.items():
        for reference in references:
            ours = asyncio.run(answered(node.node_socket, method, reference))
            theirs = asyncio.run(answered(node.containerd_socket, method, reference))
            assert ours == theirs, (method, reference)
    # containerd takes what it can't read for an image that isn't there.
    for reference in ("nix:0", "nix:0//x", "nix:0/x:other", "nix:/x.tar", "nix:0/nix/store/no-path"):
        for method in ("ImageStatus", "RemoveImage"):
            code, said = asyncio.run(answered(node.node_socket, method, reference))
            assert code == "INVALID_ARGUMENT"
            assert said.startswith(("'nix:", "'/nix/store/no-path'"))
            assert asyncio.run(answered(node.containerd_socket, method, reference)) == ("OK", "")
    long = f"nix:0/x{'y' * 5000}//"
    _, said = asyncio.run(answered(node.node_socket, "ImageStatus", long))
    assert len(said) <= 1024
    node.crictl("rmi", SHORT)


def with_volume(name: str, script: str, reference: str, image: str, mounts: list[dict[str, Any]]) -> bytes:
    """A pod of one container, with a volume that is an image."""
    container: dict[str, Any] = {
        "volumeMounts": [{"name": "volume", **each} for each in mounts],
        "imagePullPolicy": "IfNotPresent",
    }
    volume = {"name": "volume", "image": {"reference": reference, "pullPolicy": "IfNotPresent"}}
    spec: dict[str, Any] = {"hostNetwork": True, "automountServiceAccountToken": False, "volumes": [volume]}
    return nodes.manifest(name, image, command=["/bin/sh", "-c", script], container=container, **spec)


def release(node: nodes.Node) -> tuple[int, int]:
    """The first two numbers of the version of a node's containerd."""
    major, minor, *_ = str(node.version()["node"]["containerd"]).lstrip("v").split(".")
    return int(major), int(minor)


def test_an_image_volume_has_the_closure(
    kubelet: kubelets.Kubelet, node: nodes.Node, image: storeimages.StoreImage, ordinary: Path
) -> None:
    """Read-only, whole or a directory of it; where it is mounted as the store, its programs run."""
    node.ok("image", "load", "--ref", SHORT, str(ordinary))
    package = next(path for path in image.paths if path.endswith("-package-3"))
    script = "\n".join(
        [
            "ls /whole/nix/store",
            f"cat /whole{image.file}; echo",
            "echo x 2>/dev/null >/whole/x || echo it is read-only",
            "cat /part/number",
            f"{image.paths[0]}/bin/echo from the store",
            f"cat {image.link}; echo",
            "ls /bin-of-it",
        ]
    )
    places = [
        {"mountPath": "/whole"},
        {"mountPath": "/part", "subPath": f"{package[1:]}/share"},
        {"mountPath": "/nix/store", "subPath": "nix/store"},
        {"mountPath": "/bin-of-it", "subPath": "bin"},
    ]
    played = kubelet.play(with_volume("volume", script, image.reference, "kubelet-short:1", places))
    if release(node) < (2, 1):
        said = kubelet.until_said(played, "Failed")
        # Whose volume it is containerd 1 doesn't hear: these are its words for a volume that is nowhere.
        assert 'failed to mkdir "": mkdir : no such file or directory' in said
        return
    printed = kubelet.until_ended(played, node).splitlines()
    names = sorted(path.name for path in image.paths)
    assert printed[: len(names)] == names
    assert printed[len(names) : -1 - len(APPLETS)] == [
        *("a plain file", "kubelet", "it is read-only", "3", "from the store", "a plain file", "kubelet")
    ]
    assert printed[-1 - len(APPLETS) :] == sorted(["busybox", *APPLETS])
    # With the pod all of it goes.
    assert any("/image-volumes/" in mount for mount in node.mounts())
    # A kubelet takes its time for that.
    kubelet.stop()
    node.remove_all_pods()
    assert not any("/image-volumes/" in mount for mount in node.mounts())
    assert "/image-volumes/" not in node.ok("ctr", "snapshots", "--snapshotter", "nix", "ls")


def test_a_volume_that_cannot_be_is_said(
    kubelet: kubelets.Kubelet, node: nodes.Node, image: storeimages.StoreImage, ordinary: Path
) -> None:
    if release(node) < (2, 1):
        return
    node.ok("image", "load", "--ref", SHORT, str(ordinary))
    for name, sub, why in (
        ("absent", "nix/store/absent", "openat nix/store/absent: no such file or directory"),
        ("file", image.file[1:], "only directory subpath is supported"),
        # An absolute link leads out of the volume.
        ("link", f"{image.link[1:]}/x", "path escapes from parent"),
    ):
        places = [{"mountPath": "/v", "subPath": sub}]
        played = kubelet.play(with_volume(name, "true", image.reference, "kubelet-short:1", places))
        assert why in kubelet.until_said(played, "Failed")
        kubelet.withdraw(played)


@pytest.fixture(scope="module", params=parts.CONTAINERD_PARAMETERS)
def another(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[nodes.Node]:
    """A node of its own whose containerd has a runtime with another snapshotter."""
    version: str = request.param
    made = nodes.Node(42, tmp_path_factory.mktemp(f"another-{version}"), "--containerd", str(parts.containerd(version)))
    runtime = {
        "runtime_type": "io.containerd.runc.v2",
        "snapshotter": "native",
        "options": {"BinaryName": "/usr/sbin/runc"},
    }
    old = version.startswith("1")
    file = made.data_dir / f"agent/etc/containerd/config{'' if old else '-v3'}.toml.d/other.toml"
    file.parent.mkdir(parents=True)
    plugin = "io.containerd.grpc.v1.cri" if old else "io.containerd.cri.v1.runtime"
    file.write_text(tomli_w.dumps({"plugins": {plugin: {"containerd": {"runtimes": {"other": runtime}}}}}))
    with nodes.cleaned_up(made):
        made.start()
        yield made


def pull_for(node: nodes.Node, reference: str, handler: str, **annotations: str) -> str:
    """Pull an image for a pod of some runtime, as a kubelet does that tells of it."""

    async def pull() -> str:
        async with channels.connect(str(node.node_socket)) as channel:
            metadata = pb.PodSandboxMetadata(name="pod", namespace="default", uid="1")
            sandbox = pb.PodSandboxConfig(metadata=metadata, annotations=annotations)
            spec = pb.ImageSpec(image=reference, runtime_handler=handler)
            with channels.translated("the node"):
                stub = cri_grpc.ImageServiceStub(channel)
                return (await stub.PullImage(pb.PullImageRequest(image=spec, sandbox_config=sandbox))).image_ref

    return asyncio.run(pull())


def status_for(node: nodes.Node, reference: str, handler: str) -> str:
    """An image's ID, as a pod of some runtime asks for it."""

    async def ask() -> str:
        async with channels.connect(str(node.node_socket)) as channel:
            spec = pb.ImageSpec(image=reference, runtime_handler=handler)
            with channels.translated("the node"):
                stub = cri_grpc.ImageServiceStub(channel)
                return (await stub.ImageStatus(pb.ImageStatusRequest(image=spec))).image.id

    return asyncio.run(ask())


def unpacked_for(node: nodes.Node, reference: str) -> list[str]:
    """The snapshotters that have an image's layers."""
    chain = json.loads(node.crictl("inspecti", reference))["info"]["chainID"]
    listed = {each: node.ok("ctr", "snapshots", "--snapshotter", each, "ls") for each in ("nix", "native")}
    return [each for each, text in listed.items() if chain in text]


def test_a_runtime_with_another_snapshotter(
    another: nodes.Node,
    image: storeimages.StoreImage,
    archives: Path,
    busybox_layer: bytes,
    registry: registries.Registry,
    tmp_path: Path,
) -> None:
    """An image is unpacked where the runtime's containers look for it; one of store paths can't be there."""
    # Before 1.7 runtimes have no snapshotters of their own.
    where = "native" if release(another) >= (1, 7) else "nix"
    for name, handler, annotations in (
        ("by-handler", "other", {}),
        ("by-annotation", "", {"io.containerd.cri.runtime-handler": "other"}),
    ):
        archive = archives / f"{name}.tar"
        layer = image_archives.tar({name: b""})
        archive.write_bytes(image_archives.tar(image_archives.oci([busybox_layer, layer], name=None)))
        pulled = pull_for(another, f"nix:0{archive}", handler, **annotations)
        assert unpacked_for(another, f"nix:0{archive}") == [where]
        assert status_for(another, f"nix:0{archive}", "other") == pulled
        # The same image for pods of the usual runtime.
        assert pull_for(another, f"nix:0{archive}", "runc") == pulled
        assert "nix" in unpacked_for(another, f"nix:0{archive}")
        another.crictl("rmi", f"nix:0{archive}")
    if where == "nix":
        assert pull_for(another, image.reference, "other")
        return
    with pytest.raises(
        errors.FailedPreconditionError, match="made of store paths, which the snapshotter native can't run"
    ):
        pull_for(another, image.reference, "other")
    assert not status_for(another, image.reference, "")
    pulled = pull_for(another, image.reference, "")
    assert status_for(another, image.reference, "") == pulled
    with pytest.raises(
        errors.FailedPreconditionError, match=f"{image.archive} is made of store paths, which the snapshotter"
    ):
        status_for(another, image.reference, "other")


def test_a_pull_from_a_registry_for_a_runtime_with_another_snapshotter(
    another: nodes.Node, image: storeimages.StoreImage, tmp_path: Path
) -> None:
    with registries.running(tmp_path, PORT + 1) as registry:
        registry.push(image.archive, "kubelet/paths:1")
        reference = f"{registry.address}/kubelet/paths:1"
        # Which of the two names the runtime is containerd's affair: 1.x reads the annotation, 2.x both.
        sandbox = {"io.containerd.cri.runtime-handler": "other"}
        if release(another) < (1, 7):
            assert pull_for(another, reference, "other", **sandbox)
            return
        with pytest.raises(errors.FailedPreconditionError, match="made of store paths"):
            pull_for(another, reference, "other", **sandbox)
        assert not status_for(another, reference, "")
        assert pull_for(another, reference, "")
        another.crictl("rmi", reference)


def auth(**fields: str) -> pb.AuthConfig:
    return pb.AuthConfig(**fields)


@pytest.mark.parametrize("relayed", [False, True], ids=["by containerd", "by the relay"])
def test_credentials_of_a_pull(node: nodes.Node, registry: registries.Registry, relayed: bool) -> None:
    """As kubelets send what imagePullSecrets hold; which one is tried first is theirs."""
    reference = f"{LOCKED}:1"
    if relayed:
        mirror = {"endpoint": [f"http://127.0.0.1:{PORT}"], "rewrite": {"^(.*)$": "proj/$1"}}
        registries.say(node, {"mirrors": {"registry.invalid": mirror}})
        reference = "registry.invalid/locked:1"
    token = base64.b64encode(CREDENTIALS.encode()).decode()
    right = [auth(username=registries.USER, password=registries.PASSWORD), auth(auth=token)]
    wrong = [None, auth(username=registries.USER, password="wrong"), auth(auth=base64.b64encode(b"ada:no").decode())]

    async def pull(credentials: pb.AuthConfig | None) -> str:
        async with channels.connect(str(node.node_socket)) as channel:
            spec = pb.ImageSpec(image=reference)
            with channels.translated("the node"):
                stub = cri_grpc.ImageServiceStub(channel)
                return (await stub.PullImage(pb.PullImageRequest(image=spec, auth=credentials))).image_ref

    try:
        for credentials in wrong:
            with pytest.raises(errors.NixletError) as refused:
                asyncio.run(pull(credentials))
            assert registries.PASSWORD not in str(refused.value)
        for credentials in right:
            assert asyncio.run(pull(credentials)).startswith("sha256:")
            node.crictl("rmi", reference)
        # What opened it for one is nothing for another.
        with pytest.raises(errors.NixletError):
            asyncio.run(pull(None))
    finally:
        if relayed:
            registries.say(node, {})


@pytest.fixture
def poor(tmp_path: Path) -> Iterator[nodes.Node]:
    """A node whose only cache has nothing."""
    directory = tmp_path / "cache"
    directory.mkdir()
    (directory / "nix-cache-info").write_text("StoreDir: /nix/store\n")
    handler = functools.partial(_Silent, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            cache = f"http://127.0.0.1:{server.server_address[1]}"
            environment = {"NIX_CONFIG": f"substituters = {cache}", "NIXLET_TEST_CACHE": cache}
            made = nodes.Node(43, tmp_path, environment=environment)
            with nodes.cleaned_up(made):
                made.start()
                yield made
        finally:
            server.shutdown()
            thread.join()


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class calls it so)
        pass


def test_a_failed_pull_names_path_cache_and_command(poor: nodes.Node, archives: Path, tmp_path: Path) -> None:
    """In the kubelet's event and in the node's log."""
    image = storeimages.make(archives, 5, salt="poor")
    nixstore.delete(image.info, *image.paths)
    with kubelets.running(poor, tmp_path / "kubelet") as kubelet:
        played = kubelet.play(pod("poor", {"main": image.reference}, "IfNotPresent"))
        said = kubelet.until_said(played, "Failed")
    cache = poor.environment["NIXLET_TEST_CACHE"]
    assert f"the store path {image.info} is not in the Nix store and can't be fetched from {cache}" in said
    assert f"; hint: see what Nix says (nix-store --realise {image.info}), copy it here (nix copy --from STORE" in said
    assert len(said) <= 1024
    assert "\n" not in said
    assert f"{image.reference}:latest can't be pulled: the store path {image.info}" in poor.log.read_text()


def test_pinned_images_stay(node: nodes.Node, image: storeimages.StoreImage, tmp_path: Path) -> None:
    """A kubelet that is out of room removes all that isn't in use, but for what is pinned."""
    node.crictl("pull", image.reference)
    kept = storeimages.make(image.archive.parent, 3, salt="pinned")
    node.crictl("pull", kept.reference)
    name = f"{kept.reference}:latest"
    node.ok("ctr", "images", "label", name, "io.cri-containerd.pinned=pinned")
    nodes.until(lambda: pinned(node, name), "the image is pinned")
    pause = next(each["repoTags"][0] for each in listed(node) if each["pinned"] and each["repoTags"] != [name])
    assert pinned(node, pause)
    settings: dict[str, Any] = {
        "evictionHard": {"imagefs.available": "99%"},
        "imageGCHighThresholdPercent": 85,
        "imageMinimumGCAge": "1s",
        "evictionPressureTransitionPeriod": "5s",
    }
    with kubelets.running(node, tmp_path / "kubelet", **settings):
        nodes.until(lambda: not has(node, image.reference), "what is not in use is removed")
        assert has(node, name)
        assert has(node, pause)
    # Removing one is a client's own affair, as with containerd's.
    node.crictl("rmi", name)
    assert not has(node, name)


def listed(node: nodes.Node) -> list[dict[str, Any]]:
    return list(json.loads(node.crictl("images", "-o", "json"))["images"])


def has(node: nodes.Node, reference: str) -> bool:
    tags = [tag for each in listed(node) for tag in each["repoTags"] or []]
    return reference in tags or f"{reference}:latest" in tags


def pinned(node: nodes.Node, reference: str) -> bool:
    """Whether both ways of asking say so."""
    by_list = {tag: each["pinned"] for each in listed(node) for tag in each["repoTags"] or []}
    by_status = json.loads(node.crictl("inspecti", reference))["status"]["pinned"]
    return bool(by_list.get(reference) and by_status)


def test_a_volume_by_bind_mounts_is_refused(image: storeimages.StoreImage, ordinary: Path, tmp_path: Path) -> None:
    """containerd could not take it away again, nor the pod; an ordinary image is no trouble."""
    made = nodes.Node(44, tmp_path, "--containerd", str(parts.containerd("2.4.2")), "--strategy", "bind")
    with nodes.cleaned_up(made):
        made.start()
        made.ok("image", "load", "--ref", SHORT, str(ordinary))
        with kubelets.running(made, tmp_path / "kubelet") as kubelet:
            places = [{"mountPath": "/v"}]
            played = kubelet.play(with_volume("bound", "true", image.reference, "kubelet-short:1", places))
            said = kubelet.until_said(played, "Failed")
            assert "a volume can't be an image of store paths where these are bind mounts" in said
            kubelet.withdraw(played)
            played = kubelet.play(with_volume("ordinary", "ls /v/bin", "kubelet-short:1", image.reference, places))
            assert "busybox" in kubelet.until_ended(played, made).split()
            kubelet.stop()
            made.remove_all_pods()
            assert not any("/image-volumes/" in mount for mount in made.mounts())


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.7.35", "2.4.2"])
def test_the_next_kubelet(version: str, image: storeimages.StoreImage, ordinary: Path, tmp_path: Path) -> None:
    """Kubernetes 1.37: the last whose kubelet takes containerd 1."""
    made = nodes.Node(45, tmp_path, "--containerd", str(parts.containerd(version)))
    with nodes.cleaned_up(made):
        made.start()
        made.ok("image", "load", "--ref", SHORT, str(ordinary))
        with kubelets.running(made, tmp_path / "kubelet", family="kubernetes-1.37") as kubelet:
            images = {"archive": image.reference, "short": "kubelet-short:1"}
            assert run(kubelet, made, "first", images, "IfNotPresent") == [image.reference]
            assert run(kubelet, made, "second", images, "Never") == []
            if release(made) >= (2, 1):
                places = [{"mountPath": "/v"}]
                manifest = with_volume("volume", "ls /v/nix/store", image.reference, "kubelet-short:1", places)
                names = sorted(path.name for path in image.paths)
                assert kubelet.until_ended(kubelet.play(manifest), made).splitlines() == names
