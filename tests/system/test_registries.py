"""Pulls by way of registries.yaml, from real registries, on every containerd; changes are taken up while the node runs."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nixlet.store import closures
from support import image_archives, nodes, registries, storeimages

pytestmark = pytest.mark.slow

#: The registry itself, its mirrors, one that wants a login, one with certificates, one by IPv6, and nobody.
OWN, MIRROR, LOCKED, SECURE, SIX, NOBODY = 5971, 5972, 5973, 5974, 5975, 5979


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> registries.Authority:
    return registries.Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def certificates(authority: registries.Authority) -> dict[str, str]:
    """What registries.yaml says of the registry with certificates."""
    certificate, key = authority.issue("client")
    return {"ca_file": str(authority.certificate), "cert_file": str(certificate), "key_file": str(key)}


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory,
    ordinary: Path,
    authority: registries.Authority,
    certificates: dict[str, str],
) -> Iterator[dict[int, registries.Registry]]:
    """The registries, by port."""
    directory = tmp_path_factory.mktemp("registries")
    certificate, key = authority.issue("registry")
    tls = {"certificate": str(certificate), "key": str(key), "clientcas": [str(authority.certificate)]}
    with contextlib.ExitStack() as stack:

        def serve(port: int, **how: Any) -> registries.Registry:
            return stack.enter_context(registries.running(directory / str(port), port, **how))

        found = {
            OWN: serve(OWN, host="localhost"),
            MIRROR: serve(MIRROR),
            LOCKED: serve(LOCKED, login=True),
            SECURE: serve(SECURE, tls=tls),
            SIX: serve(SIX, listens="", login=True),
        }
        found[OWN].push(ordinary, "own:1")
        found[MIRROR].push(ordinary, "library/mirrored:1")
        found[LOCKED].push(ordinary, "proj/locked:1", "--dest-creds", f"{registries.USER}:{registries.PASSWORD}")
        found[SIX].push(ordinary, "library/six:1", "--dest-creds", f"{registries.USER}:{registries.PASSWORD}")
        (directory / "client").mkdir()
        for key_of, name in (("cert_file", "client.cert"), ("key_file", "client.key")):
            (directory / "client" / name).symlink_to(certificates[key_of])
        found[SECURE].push(ordinary, "secure:1", "--dest-cert-dir", str(directory / "client"))
        yield found


@pytest.fixture
def said(node: nodes.Node) -> Iterator["Said"]:
    made = Said(node)
    yield made
    made.say({})


class Said:
    """A node's registries.yaml."""

    def __init__(self, node: nodes.Node) -> None:
        self._node = node

    def say(self, text: dict[str, Any] | str) -> None:
        """Write it, and wait until the node has read it."""
        registries.say(self._node, text)

    def hosts(self) -> dict[str, str]:
        """The files that containerd reads."""
        directory = self._node.data_dir / "agent/etc/containerd/certs.d"
        return {path.parent.name: path.read_text() for path in directory.glob("*/hosts.toml")}


def pull(node: nodes.Node, reference: str) -> None:
    """Pull an image anew, through the node's image service."""
    node.crictl("pull", reference)
    node.crictl("rmi", reference)


def refused(node: nodes.Node, reference: str, *options: str) -> str:
    """Pull what can't be pulled; why."""
    with pytest.raises(AssertionError) as raised:
        node.crictl("pull", *options, reference)
    return str(raised.value)


def asked(registry: registries.Registry) -> bool:
    """Whether a registry was asked for an image since the last time; its log is written a moment later."""
    for _ in range(20):
        if any("/manifests/" in path for path in registry.requests()):
            return True
        time.sleep(0.02)
    return False


def test_mirrors_one_after_the_other_and_the_registry_last(
    node: nodes.Node, said: Said, served: dict[int, registries.Registry]
) -> None:
    """One that is down, one that hasn't got it: each is asked, and the registry gives it."""
    with socket.socket() as nobody:
        assert nobody.connect_ex(("127.0.0.1", NOBODY)) != 0
    mirrors = [f"http://127.0.0.1:{NOBODY}", f"http://127.0.0.1:{MIRROR}"]
    said.say({"mirrors": {"localhost:5971": {"endpoint": mirrors}}})
    pull(node, "localhost:5971/own:1")
    assert asked(served[MIRROR])
    assert asked(served[OWN])


def test_a_mirror_serves_a_registry_that_is_not_there(
    node: nodes.Node, said: Said, served: dict[int, registries.Registry]
) -> None:
    said.say({"mirrors": {"registry.invalid": {"endpoint": [f"127.0.0.1:{MIRROR}"]}}})
    pull(node, "registry.invalid/library/mirrored:1")
    assert asked(served[MIRROR])
    # What was said is not true any more, and the next pull knows.
    said.say({})
    assert said.hosts() == {}
    assert "registry.invalid" in refused(node, "registry.invalid/library/mirrored:1")
    assert not asked(served[MIRROR])


def test_a_mirror_of_every_registry(node: nodes.Node, said: Said, served: dict[int, registries.Registry]) -> None:
    said.say({"mirrors": {"*": {"endpoint": [f"http://127.0.0.1:{MIRROR}"]}}})
    pull(node, "any.invalid/library/mirrored:1")
    assert asked(served[MIRROR])


def test_other_names_on_a_mirror(node: nodes.Node, said: Said, served: dict[int, registries.Registry]) -> None:
    mirror = {"endpoint": [f"http://127.0.0.1:{MIRROR}"], "rewrite": {"^team/(.*)": "library/$1"}}
    said.say({"mirrors": {"registry.invalid": mirror}})
    pull(node, "registry.invalid/team/mirrored:1")
    paths = served[MIRROR].requests()
    assert paths
    assert all(path.startswith("/v2/library/mirrored/") for path in paths)


def test_other_names_behind_a_login(node: nodes.Node, said: Said, served: dict[int, registries.Registry]) -> None:
    mirror = {"endpoint": [f"http://127.0.0.1:{LOCKED}"], "rewrite": {"^(.*)$": "proj/$1"}}
    login = {"auth": {"username": registries.USER, "password": registries.PASSWORD}}
    said.say({"mirrors": {"registry.invalid": mirror}, "configs": {f"127.0.0.1:{LOCKED}": login}})
    pull(node, "registry.invalid/locked:1")
    assert asked(served[LOCKED])


@pytest.mark.usefixtures("served")
def test_a_pulls_own_login_wins(node: nodes.Node, said: Said) -> None:
    """A pod's imagePullSecrets come this way; errors name the registry, and no secret of ours."""
    mirror = {"endpoint": [f"http://127.0.0.1:{LOCKED}"], "rewrite": {"^(.*)$": "proj/$1"}}
    reference, host, own = (
        "registry.invalid/locked:1",
        f"127.0.0.1:{LOCKED}",
        f"{registries.USER}:{registries.PASSWORD}",
    )
    said.say({"mirrors": {"registry.invalid": mirror}})
    why = refused(node, reference)
    assert f"{host} wants credentials, and {node.registries} has none for it" in why
    (secret,) = re.findall('Nixlet-Endpoint = "(.+)"', str(said.hosts()))
    assert secret not in why
    node.crictl("pull", "--creds", own, reference)
    node.crictl("rmi", reference)
    login = {"username": registries.USER, "password": "wrong"}
    said.say({"mirrors": {"registry.invalid": mirror}, "configs": {host: {"auth": login}}})
    assert f"{host} refuses the credentials that {node.registries} has for it" in refused(node, reference)
    node.crictl("pull", "--creds", own, reference)
    node.crictl("rmi", reference)
    right = {"username": registries.USER, "password": registries.PASSWORD}
    said.say({"mirrors": {"registry.invalid": mirror}, "configs": {host: {"auth": right}}})
    assert f"{host} refuses the credentials that came" in refused(node, reference, "--creds", f"{registries.USER}:no")
    pull(node, reference)


def test_a_login_that_comes_while_the_node_runs(
    node: nodes.Node, said: Said, served: dict[int, registries.Registry]
) -> None:
    reference, host = f"127.0.0.1:{LOCKED}/proj/locked:1", f"127.0.0.1:{LOCKED}"
    said.say({"configs": {host: {"auth": {"username": registries.USER, "password": "wrong"}}}})
    assert "401" in refused(node, reference) or "authorization failed" in refused(node, reference)
    said.say({"configs": {host: {"auth": {"username": registries.USER, "password": registries.PASSWORD}}}})
    pull(node, reference)
    # Not where others could read them, nor in any file of containerd's: it was not started again.
    assert registries.PASSWORD not in str(said.hosts())
    said.say({})
    refused(node, reference)
    assert asked(served[LOCKED])


def test_certificates_of_our_own(node: nodes.Node, said: Said, certificates: dict[str, str]) -> None:
    """The registry's by its CA, ours because it asks for one."""
    reference, host = f"127.0.0.1:{SECURE}/secure:1", f"127.0.0.1:{SECURE}"
    said.say({"configs": {host: {"tls": {"ca_file": certificates["ca_file"]}}}})
    refused(node, reference)
    said.say({"mirrors": {host: {"endpoint": [f"https://{host}"]}}, "configs": {host: {"tls": certificates}}})
    pull(node, reference)
    unchecked = {key: value for key, value in certificates.items() if key != "ca_file"}
    said.say(
        {
            "mirrors": {host: {"endpoint": [f"https://{host}"]}},
            "configs": {host: {"tls": {**unchecked, "insecure_skip_verify": True}}},
        }
    )
    pull(node, reference)


def test_certificates_where_names_are_others(node: nodes.Node, said: Said, certificates: dict[str, str]) -> None:
    host = f"127.0.0.1:{SECURE}"
    mirror = {"endpoint": [f"https://{host}"], "rewrite": {"^team/": ""}}
    said.say({"mirrors": {"registry.invalid": mirror}, "configs": {host: {"tls": certificates}}})
    pull(node, "registry.invalid/team/secure:1")


def test_a_mistake_is_said_and_what_was_there_holds(
    node: nodes.Node, said: Said, served: dict[int, registries.Registry]
) -> None:
    said.say({"mirrors": {"registry.invalid": {"endpoint": [f"127.0.0.1:{MIRROR}"]}}})
    said.say("mirrors:\n  registry.invalid:\n    endpoint: none\n")
    mistake = "registries.yaml, line 3: mirrors.registry.invalid.endpoint must be a list"
    assert mistake in node.log.read_text()
    # The log is not where people look first.
    assert mistake in refused(node, "another.invalid/library/mirrored:1")
    with socket.socket(socket.AF_UNIX) as health:
        health.connect(f"{node.state_dir}/health.sock")
        health.sendall(b"GET /readyz?verbose HTTP/1.1\r\nHost: node\r\n\r\n")
        assert mistake in b"".join(iter(lambda: health.recv(4096), b"")).decode()
    pull(node, "registry.invalid/library/mirrored:1")
    assert asked(served[MIRROR])


@pytest.fixture
def another(node: nodes.Node, tmp_path: Path) -> Iterator[nodes.Node]:
    """A second node, with the containerd of the first, that is not started yet."""
    arguments = node.arguments[node.arguments.index("--containerd") :]
    made = nodes.Node(30, tmp_path, *arguments)
    with nodes.cleaned_up(made):
        yield made


def test_a_login_that_is_there_when_the_node_starts(
    another: nodes.Node, served: dict[int, registries.Registry]
) -> None:
    """As with k3s, containerd is told of it, for whoever pulls without the node."""
    host = f"127.0.0.1:{LOCKED}"
    login = {"auth": {"username": registries.USER, "password": registries.PASSWORD}}
    another.registries.write_text(json.dumps({"configs": {host: login}}))
    another.start()
    config = another.data_dir / "agent/etc/containerd/config.toml"
    assert registries.PASSWORD in config.read_text()
    assert config.stat().st_mode & 0o777 == 0o600
    pull(another, f"{host}/proj/locked:1")
    assert asked(served[LOCKED])
    # Taken out of the file, it is gone: at once, though containerd has read it.
    Said(another).say({})
    assert f"{host} wants credentials" in refused(another, f"{host}/proj/locked:1")


@pytest.mark.usefixtures("served")
def test_a_mirror_by_its_address_of_ipv6(node: nodes.Node, said: Said) -> None:
    """containerd 1 can't read such an address as a key; the credentials for it must not keep it from starting."""
    login = {"auth": {"username": registries.USER, "password": registries.PASSWORD}}
    mirror = {"endpoint": [f"http://[::1]:{SIX}"]}
    said.say({"mirrors": {"registry.invalid": mirror}, "configs": {f"[::1]:{SIX}": login}})
    pull(node, "registry.invalid/library/six:1")


def test_without_the_default_endpoint(another: nodes.Node, served: dict[int, registries.Registry]) -> None:
    """Mirrors alone are asked, even for what only the registry has."""
    another.arguments.append("--disable-default-registry-endpoint")
    mirror = {"endpoint": [f"http://127.0.0.1:{NOBODY}", f"http://127.0.0.1:{MIRROR}"]}
    another.registries.write_text(json.dumps({"mirrors": {"localhost:5971": mirror}}))
    another.start()
    refused(another, "localhost:5971/own:1")
    assert asked(served[MIRROR])
    assert not asked(served[OWN])
    pull(another, "localhost:5971/library/mirrored:1")


#: A layer that several images have.
SAME = image_archives.tar({"the-same": b""})


def push_nix_image(
    registry: registries.Registry, directory: Path, name: str, layer: bytes, notes: dict[str, str], *cmd: str
) -> Path:
    """Put an image of one Nix layer into a registry, below an index; its archive."""
    manifest, blobs = image_archives.image(
        [layer], annotations=[notes], config={"Labels": {"name": name}, "Cmd": list(cmd)}
    )
    own = image_archives.entry(manifest, platform={"os": "linux", "architecture": "amd64"})
    inner = image_archives.index_json(own)
    outer = image_archives.index_json(
        {**image_archives.entry(inner, f"localhost/{name}"), "mediaType": f"{image_archives.OCI}.index.v1+json"}
    )
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": outer, image_archives.blob(inner): inner}
    path = directory / f"{name.replace('/', '-').replace(':', '-')}.tar"
    path.write_bytes(image_archives.tar({**files, **blobs}))
    registry.push(path, name, "--all")
    return path


def records(node: nodes.Node) -> dict[str, str]:
    """What containerd's records of images lead to."""
    lines = node.ok("ctr", "images", "ls").splitlines()[1:]
    return {line.split()[0]: line.split()[2] for line in lines}


def test_pulled_layers_of_equal_content_never_have_anothers_closure(
    node: nodes.Node,
    served: dict[int, registries.Registry],
    ordinary: Path,
    tmp_path: Path,
    store_images: dict[int, storeimages.StoreImage],
) -> None:
    """containerd takes a layer that is unpacked, whatever it shows; what such a pull recorded is taken back."""
    closure = store_images[50].paths
    own = closures.ClosureReference(None, tuple(closure)).annotations()
    other = closures.ClosureReference(None, tuple(closure[:2])).annotations()
    home = "localhost:5971/equal"
    push_nix_image(served[OWN], tmp_path, "equal/own:1", SAME, own, f"{closure[0]}/bin/echo", "own")
    push_nix_image(served[OWN], tmp_path, "equal/other:1", SAME, other, f"{closure[0]}/bin/echo", "other")
    served[OWN].push(ordinary, "equal/moved:1")
    node.crictl("pull", f"{home}/moved:1")
    node.crictl("pull", f"{home}/own:1")
    push_nix_image(served[OWN], tmp_path, "equal/moved:1", SAME, other, f"{closure[0]}/bin/echo", "moved")
    before = records(node)
    why = refused(node, f"{home}/other:1")
    assert f"can't be loaded with a closure of 2 paths: {home}/own:1, {home}/own@sha256:" in why
    assert "has the same layer with a closure of 50 paths" in why
    assert records(node) == before
    # A name that led to another image leads there again.
    refused(node, f"{home}/moved:1")
    assert records(node) == before
    # Pulls at the same time see each other's records, and leave none.
    pulls = [threading.Thread(target=refused, args=(node, f"{home}/other:1")) for _ in range(4)]
    for each in pulls:
        each.start()
    for each in pulls:
        each.join()
    assert records(node) == before
    # What others recorded stays.
    node.ok("ctr", "images", "pull", "--plain-http", "--snapshotter", "nix", f"{home}/other:1")
    imported = records(node)
    assert f"{home}/other:1" in imported
    refused(node, f"{home}/other:1")
    assert imported.items() <= records(node).items()
    # An image that is right is run, and pulled again.
    node.crictl("pull", f"{home}/own:1")
    assert node.ok("run", "--rm", f"{home}/own:1") == "own\n"
    for name in ("own", "other", "moved"):
        node.crictl("rmi", f"{home}/{name}:1")
    # Now it is whoever's comes next.
    node.ok("ctr", "leases", "create", "--id", "test")
    node.ok("ctr", "leases", "delete", "--sync", "test")
    node.crictl("pull", f"{home}/other:1")
    assert f"{home}/other:1" in refused(node, f"{home}/own:1")
    node.crictl("rmi", f"{home}/other:1")


def test_a_pulled_layer_that_others_unpacked_without_its_closure_gets_it(
    node: nodes.Node,
    served: dict[int, registries.Registry],
    tmp_path: Path,
    store_images: dict[int, storeimages.StoreImage],
) -> None:
    closure = store_images[50].paths
    notes = closures.ClosureReference(None, tuple(closure)).annotations()
    layer = image_archives.tar({"pulled-and-mended": b""})
    # Each import by the same archive: ctr's older versions pass no annotations on.
    path = push_nix_image(served[OWN], tmp_path, "mended:1", layer, notes, f"{closure[0]}/bin/echo", "mended")
    node.ok("ctr", "images", "import", "--snapshotter", "nix", str(path))
    node.crictl("pull", "localhost:5971/mended:1")
    assert node.ok("run", "--rm", "localhost:5971/mended:1") == "mended\n"
    node.crictl("rmi", "localhost:5971/mended:1")


def replacement(registry: registries.Registry) -> bytes:
    """A manifest whose image is asked for each time."""
    always = {"imagePullPolicy": "Always"}
    return nodes.manifest("web", f"{registry.address}/own:1", command=["/bin/sleep", "1000"], container=always)


def test_a_pod_that_goes_while_its_successor_is_pulled_is_replaced(
    node: nodes.Node,
    said: Said,
    served: dict[int, registries.Registry],
    store_images: dict[int, storeimages.StoreImage],
    tmp_path: Path,
) -> None:
    said.say({})
    own = served[OWN]
    node.ok("run", "-d", "--name", "web", store_images[50].reference, "--", "/bin/sleep", "1000")
    manifest = tmp_path / "web.json"
    manifest.write_bytes(replacement(own))
    try:
        # Connections of other tests' pulls end by themselves.
        nodes.until(lambda: not own.is_being_asked(), "nobody asks the registry")
        with contextlib.ExitStack() as stack:
            held = stack.enter_context(contextlib.ExitStack())
            held.enter_context(own.held())
            playing = stack.enter_context(node.started("kube", "play", "--replace", str(manifest)))
            nodes.until(own.is_being_asked, "the registry is asked")
            node.ok("rm", "-f", "web")
            assert playing.poll() is None
            held.close()
            assert playing.wait(60) == 0
        (pod,) = json.loads(node.ok("ps", "-o", "json"))
        assert pod["pod"] == "web"
    finally:
        node.ok("rm", "-f", "web")
        node.crictl("rmi", f"{own.address}/own:1")


def test_pods_that_replace_each_other_at_once_are_told_so(
    node: nodes.Node,
    said: Said,
    served: dict[int, registries.Registry],
    tmp_path: Path,
) -> None:
    said.say({})
    own = served[OWN]
    manifest = tmp_path / "web.json"
    manifest.write_bytes(replacement(own))
    try:
        nodes.until(lambda: not own.is_being_asked(), "nobody asks the registry")
        with own.held(), node.started("kube", "play", "--replace", str(manifest)) as playing:
            nodes.until(own.is_being_asked, "the registry is asked")
            again = node.run("kube", "play", "--replace", str(manifest))
            assert again.returncode == 125
            assert again.stderr.startswith(b"error: there is a pod web already\nhint: somebody else played it")
            playing.terminate()
    finally:
        node.run("rm", "-f", "web")
