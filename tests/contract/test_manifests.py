"""Manifests of a directory, applied by the real kubectl to a real API server."""

import asyncio
import base64
import contextlib
import functools
import http.server
import json
import logging
import os
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nixlet import errors
from nixlet.node.manifests import deployer as deployers
from nixlet.node.manifests import kubectl, objects, resting
from support import controlplanes

_PATIENCE = 60

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployers, "_INTERVAL", 0.2)
    monkeypatch.setattr(resting, "_REST", 0.5)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[controlplanes.ApiServer]:
    made = controlplanes.ApiServer(tmp_path_factory.mktemp("apiserver"))
    with made.running():
        yield made


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    directory = tmp_path / "manifests"
    directory.mkdir(mode=0o700)
    return directory


def through(server: controlplanes.ApiServer, kubeconfig: Path | None = None) -> kubectl.Kubectl:
    cache = str(server.directory / "our-cache")
    return kubectl.Kubectl(
        controlplanes.program("kubectl"), str(kubeconfig or server.kubeconfig), cache, os.environ["PATH"]
    )


def deployer(server: controlplanes.ApiServer, directory: Path, **options: Any) -> deployers.Deployer:
    return deployers.Deployer(str(directory), through(server), **options)


@contextlib.asynccontextmanager
async def deploying(made: deployers.Deployer) -> AsyncIterator[deployers.Deployer]:
    async with deployers.deploying(made):
        yield made


async def until(condition: Callable[[], Any]) -> Any:
    """What a condition gives when it holds."""
    async with asyncio.timeout(_PATIENCE):
        while not (found := await asyncio.to_thread(condition)):
            await asyncio.sleep(0.1)
        return found


def gone(server: controlplanes.ApiServer, name: str) -> bool:
    return server.get("configmap", name) is None


def config_map(name: str, namespace: str = "", **data: str) -> dict[str, Any]:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


async def made_of(name: str) -> str:
    return yaml.safe_dump(config_map(name))


def write(path: Path, *documents: Any) -> None:
    """As people and programs write: not at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump_all(documents))
    path.chmod(0o600)


async def test_files_are_applied_and_changed_and_what_they_no_longer_name_goes(
    server: controlplanes.ApiServer, manifests: Path
) -> None:
    write(manifests / "one.yaml", config_map("a", "default", x="1"), config_map("b"), config_map("c", "kube-system"))
    write(manifests / "sub" / "two.json", config_map("two"))
    write(manifests / "notes.txt", config_map("note"))
    write(manifests / ".hidden.yaml", config_map("hidden"))
    async with deploying(deployer(server, manifests)) as made:
        await until(lambda: made.applied == ("one.yaml", "sub/two.json"))
        assert server.get("configmap", "a")["data"] == {"x": "1"}
        assert server.get("configmap", "b")["metadata"]["labels"] == {objects.MADE_BY: "one.yaml"}
        assert server.get("configmap", "c", "-n", "kube-system") is not None
        assert server.get("configmap", "two") is not None
        assert server.get("configmap", "note") is None
        assert server.get("configmap", "hidden") is None
        # "b" is named with the namespace that it had anyway, "c" is named no longer, and what a file of its own has now isn't lost.
        number = server.get("configmap", "b")["metadata"]["uid"]
        write(manifests / "one.yaml", config_map("b", "default", x="2"))
        write(manifests / "three.yml", config_map("a", x="3"))
        await until(lambda: "three.yml" in made.applied)
        await until(lambda: server.get("configmap", "c", "-n", "kube-system") is None)
        assert server.get("configmap", "b")["data"] == {"x": "2"}
        assert server.get("configmap", "b")["metadata"]["uid"] == number
        moved = server.get("configmap", "a")
        assert moved["data"] == {"x": "3"}
        assert moved["metadata"]["labels"] == {objects.MADE_BY: "three.yml"}
        assert made.problems == {}
        # A file that goes takes nothing along.
        (manifests / "three.yml").unlink()
        await until(lambda: made.applied == ("one.yaml", "sub/two.json"))
    assert server.get("configmap", "a")["data"] == {"x": "3"}


@pytest.mark.parametrize("begun", [False, True], ids=["a moment later", "not yet whole"])
async def test_what_moves_to_another_file_is_never_away(
    server: controlplanes.ApiServer, manifests: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Nothing is deleted while it isn't known what another file names."""
    if not begun:
        # Both are written in that time.
        monkeypatch.setattr(resting, "_REST", 3)
    name = "moving-not-whole" if begun else "moving-later"
    write(manifests / "from.yaml", config_map(name), config_map(f"{name}-stays"), config_map(f"{name}-goes"))
    write(manifests / "to.yaml", config_map(f"{name}-other"))
    async with deploying(deployer(server, manifests)) as made:
        await until(lambda: made.applied == ("from.yaml", "to.yaml"))
        number = server.get("configmap", name)["metadata"]["uid"]
        write(manifests / "from.yaml", config_map(f"{name}-stays", x="1"))
        if begun:
            (manifests / "to.yaml").write_text("a: b: c\n")
            await until(lambda: "to.yaml" in made.problems)
            await until(lambda: server.get("configmap", f"{name}-stays").get("data") == {"x": "1"})
        await asyncio.sleep(0.5)
        assert not gone(server, f"{name}-goes")
        write(manifests / "to.yaml", config_map(f"{name}-other"), config_map(name))
        await until(lambda: made.applied == ("from.yaml", "to.yaml"))
        await until(lambda: gone(server, f"{name}-goes"))
        assert server.get("configmap", name)["metadata"]["uid"] == number
        assert server.get("configmap", name)["metadata"]["labels"] == {objects.MADE_BY: "to.yaml"}
        assert made.problems == {}


async def test_what_another_file_names_stays_though_it_is_refused_there(
    server: controlplanes.ApiServer, manifests: Path
) -> None:
    write(manifests / "one.yaml", config_map("taken"), config_map("one"))
    async with deploying(deployer(server, manifests)) as made:
        await until(lambda: made.applied == ("one.yaml",))
        write(manifests / "two.yaml", {**config_map("taken"), "data": {"x": ["no", "text"]}})
        await until(lambda: "two.yaml" in made.problems)
        write(manifests / "one.yaml", config_map("one", x="1"))
        await until(lambda: server.get("configmap", "one").get("data") == {"x": "1"})
        await until(lambda: made.applied == ("one.yaml",))
        assert not gone(server, "taken")
        # Nor is it forgotten.
        (manifests / "two.yaml").unlink()
        write(manifests / "one.yaml", config_map("one", x="2"))
        await until(lambda: gone(server, "taken"))


async def test_what_was_made_is_known_to_the_next_node_and_what_others_made_is_left(
    server: controlplanes.ApiServer, manifests: Path
) -> None:
    file = manifests / "known.yaml"
    write(file, *(config_map(f"known-{number}") for number in range(3)))
    async with deploying(deployer(server, manifests)) as made:
        await until(lambda: made.applied)
    # Somebody made one of them anew, for themselves.
    server.kubectl("delete", "configmap", "known-1")
    server.kubectl("create", "configmap", "known-1")
    write(file, config_map("known-0"))
    async with deploying(deployer(server, manifests)) as made:
        await until(lambda: server.get("configmap", "known-2") is None)
        await until(lambda: made.applied)
    assert server.get("configmap", "known-0") is not None
    assert server.get("configmap", "known-1") is not None
    record = server.get("configmap", objects.record_name("known.yaml"), "-n", objects.RECORD_NAMESPACE)
    assert record["data"]["objects"] == '[{"group":"","kind":"ConfigMap","namespace":"default","name":"known-0"}]'


async def test_what_is_wrong_is_told_once_and_what_is_mended_is_applied(
    server: controlplanes.ApiServer, manifests: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nixlet.manifests")
    (manifests / "syntax.yaml").write_text("a: b: c\n")
    write(manifests / "nameless.yaml", {"apiVersion": "v1", "kind": "ConfigMap"})
    write(manifests / "half.yaml", config_map("half"), config_map("half-2", "no-such-namespace"))
    write(manifests / "unknown.yaml", {"apiVersion": "example.com/v1", "kind": "Foo", "metadata": {"name": "x"}})
    (manifests / "empty.yaml").touch()
    write(manifests / "open.yaml", config_map("open"))
    (manifests / "open.yaml").chmod(0o666)
    write(manifests / "good.yaml", config_map("good"))
    async with deploying(deployer(server, manifests)) as made:
        await until(lambda: made.applied == ("good.yaml",) and len(made.problems) == 6)
        problems = made.problems
        assert "mapping values are not allowed" in problems["syntax.yaml"]
        assert "object 1 of nameless.yaml has no name" in problems["nameless.yaml"]
        assert 'namespaces "no-such-namespace" not found' in problems["half.yaml"]
        assert 'no matches for kind "Foo" in version "example.com/v1"' in problems["unknown.yaml"]
        assert "is empty: what it made before stays" in problems["empty.yaml"]
        assert "can be written by everyone" in problems["open.yaml"]
        assert server.get("configmap", "half") is not None, "the rest is applied"
        await asyncio.sleep(3)
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(told) == 6, told
        server.kubectl("create", "namespace", "no-such-namespace")
        (manifests / "syntax.yaml").write_text("# nothing any more\n")
        (manifests / "open.yaml").chmod(0o644)
        await until(lambda: {"half.yaml", "syntax.yaml", "open.yaml"} <= set(made.applied))
        assert sorted(made.problems) == ["empty.yaml", "nameless.yaml", "unknown.yaml"]
    server.kubectl("delete", "namespace", "no-such-namespace", "--wait=false")


async def test_what_a_refused_manifest_made_is_not_forgotten(server: controlplanes.ApiServer, manifests: Path) -> None:
    file = manifests / "refused.yaml"
    write(file, config_map("begun"), {**config_map("other"), "data": {"x": ["no", "text"]}})
    async with deploying(deployer(server, manifests)) as made:
        await until(lambda: made.problems)
        assert server.get("configmap", "begun") is not None
        write(file, config_map("instead"))
        await until(lambda: made.applied == ("refused.yaml",))
        assert made.problems == {}
    assert server.get("configmap", "begun") is None
    assert server.get("configmap", "instead") is not None


async def test_kinds_and_namespaces_come_before_what_needs_them(
    server: controlplanes.ApiServer, manifests: Path
) -> None:
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.nixlet.test"},
        "spec": {
            "group": "nixlet.test",
            "names": {"kind": "Widget", "plural": "widgets"},
            "scope": "Cluster",
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }
    # Of a kind without namespaces, and with one all the same.
    widget = {"apiVersion": "nixlet.test/v1", "kind": "Widget", "metadata": {"name": "w", "namespace": "shop"}}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "shop"}}
    file = manifests / "kinds.yaml"
    write(file, widget, config_map("in-shop", "shop"), role, namespace, definition)
    async with deploying(deployer(server, manifests)) as made:
        await until(lambda: made.applied == ("kinds.yaml",))
        number = server.get("widget", "w")["metadata"]["uid"]
        role["metadata"] = {"name": "shop", "namespace": "anything"}
        widget["metadata"] = {"name": "w"}
        write(file, widget, role, namespace, definition)
        await until(lambda: server.get("configmap", "in-shop", "-n", "shop") is None)
        await until(lambda: made.applied == ("kinds.yaml",))
        assert server.get("widget", "w")["metadata"]["uid"] == number
        assert server.get("clusterrole", "shop") is not None
        # The definition takes its objects along; that they are gone then is no failure.
        write(file, namespace)
        await until(lambda: server.get("crd", "widgets.nixlet.test") is None)
        await until(lambda: made.applied == ("kinds.yaml",))
        assert server.get("clusterrole", "shop") is None


async def test_what_an_api_server_serves_that_is_away_is_not_taken_for_gone(
    server: controlplanes.ApiServer, manifests: Path
) -> None:
    """An API of its own, served by a pod that isn't there just now: its objects aren't known, and aren't forgotten."""
    spec = {"group": "away.test", "version": "v1", "groupPriorityMinimum": 1000, "versionPriority": 10}
    spec["service"] = {"name": "away", "namespace": "default"}
    service = {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": "v1.away.test"}}
    write(manifests / "away.yaml", {**service, "spec": {**spec, "insecureSkipTLSVerify": True}})
    thing = objects.Object("away.test", "Thing", "", "x")
    await through(server).write_record(objects.Record("things.yaml", frozenset((thing,))), "things.yaml")
    async with deploying(deployer(server, manifests)) as made:
        await until(lambda: made.applied == ("away.yaml",))
        await until(lambda: "not present" in str(server.get("apiservice", "v1.away.test")["status"]))
        write(manifests / "things.yaml", config_map("things"))
        await until(lambda: made.problems)
        assert made.problems == {"things.yaml": "Thing x can't be looked up: its API away.test is not available"}
        record = server.get("configmap", objects.record_name("things.yaml"), "-n", objects.RECORD_NAMESPACE)
        assert "away.test" in record["data"]["objects"]
        (manifests / "away.yaml").unlink()
        server.kubectl("delete", "apiservice", "v1.away.test")
        await until(lambda: made.applied == ("things.yaml",))


async def test_skipped_files_are_left_alone_and_what_disabled_ones_made_goes(
    server: controlplanes.ApiServer, manifests: Path
) -> None:
    write(manifests / "kept.yaml", config_map("kept"))
    write(manifests / "skipped.yaml", config_map("skipped"))
    write(manifests / "off.yaml", config_map("off"))
    write(manifests / "directory" / "inside.yaml", config_map("inside"))
    packaged = {"ours.yaml": functools.partial(made_of, "ours"), "left.yaml": functools.partial(made_of, "left")}
    async with deploying(deployer(server, manifests, packaged=packaged)) as made:
        await until(lambda: len(made.applied) == 6)
    (manifests / "skipped.yaml.skip").touch()
    (manifests / "left.yaml.skip").touch()
    write(manifests / "skipped.yaml", config_map("skipped-2"))
    write(manifests / "left.yaml", config_map("edited"))
    disabled = {"off", "directory", "ours", "unheard-of"}
    # Whether the file is still there or not.
    (manifests / "off.yaml").unlink()
    async with deploying(deployer(server, manifests, packaged=packaged, disabled=disabled)) as made:
        await until(lambda: made.applied == ("kept.yaml",))
        for name in ("off", "inside", "ours"):
            await until(functools.partial(gone, server, name))
        assert made.problems == {}
    assert server.get("configmap", "skipped") is not None
    assert server.get("configmap", "left") is not None
    assert server.get("configmap", "skipped-2") is None
    assert "edited" in (manifests / "left.yaml").read_text()
    assert not (manifests / "ours.yaml").exists()
    assert (manifests / "directory" / "inside.yaml").exists(), "somebody's own"
    records = [each["metadata"]["name"] for each in server.get("configmap", "-n", "kube-system")["items"]]
    assert objects.record_name("kept.yaml") in records
    assert objects.record_name("off.yaml") not in records


async def test_what_the_node_brings_is_made_again_until_it_is_there(
    server: controlplanes.ApiServer, manifests: Path
) -> None:
    tries = 0

    async def make() -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise errors.UnavailableError("the store is away")
        return yaml.safe_dump(config_map("brought"))

    write(manifests / "other.yaml", config_map("beside"))
    async with deploying(deployer(server, manifests / "below", packaged={"brought.yaml": make})) as made:
        await until(lambda: made.problems == {"brought.yaml": "the store is away"})
        await until(lambda: made.applied == ("brought.yaml",))
        assert made.problems == {}
    assert tries == 3
    assert (manifests / "below").stat().st_mode & 0o777 == 0o700
    assert (manifests / "below" / "brought.yaml").stat().st_mode & 0o777 == 0o600


async def test_there_is_a_directory_for_people_s_own_where_the_node_brings_nothing(
    server: controlplanes.ApiServer, manifests: Path
) -> None:
    packaged = {"off.yaml": functools.partial(made_of, "off")}
    async with deploying(deployer(server, manifests / "server" / "manifests", packaged=packaged, disabled={"off"})):
        await until((manifests / "server" / "manifests").is_dir)
    assert (manifests / "server" / "manifests").stat().st_mode & 0o777 == 0o700


async def test_secrets_are_applied_and_told_of_nowhere(
    server: controlplanes.ApiServer, manifests: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"pin": "hunter2hunter2"}}
    write(manifests / "secret.yaml", secret)
    # Refused by the API server, whose words have the value.
    write(manifests / "number.yaml", {**secret, "metadata": {"name": "number"}, "stringData": {"pin": 424242424242}})
    write(
        manifests / "base64.yaml",
        {**secret, "metadata": {"name": "base64"}, "stringData": None, "data": {"pin": "hunter3!"}},
    )
    (manifests / "broken.yaml").write_text("hunter4hunter4hunter4\n")
    # What its readers quote of a text that is no object.
    (manifests / "kindless.yaml").write_text("apiVersion: v1\nmetadata: {name: s}\nstringData: {pin: hunter5}\n")
    for number, pin in enumerate(("*hunter6", "{? {hunter7: x} : y}", "{~: hunter8}", '"\\xhunter9"', "!!int hunter0")):
        (manifests / f"value-{number}.yaml").write_text(
            f"apiVersion: v1\nkind: Secret\nmetadata: {{name: s}}\nstringData: {{pin: {pin}}}\n"
        )
    async with deploying(deployer(server, manifests)) as made:
        await until(lambda: made.applied == ("secret.yaml",) and len(made.problems) == 9)
        assert "Secret number: refused" in made.problems["number.yaml"]
        assert made.problems["kindless.yaml"] == "kindless.yaml can't be read: an object has no kind"
        assert "unknown anchor" in made.problems["value-0.yaml"]
        said = f"{made.problems} {caplog.text} {[record.__dict__ for record in caplog.records]}"
    assert server.get("secret", "s") is not None
    for value in ("hunter", "424242", "aHVudGVy"):
        assert value not in said
    record = server.get("configmap", objects.record_name("secret.yaml"), "-n", objects.RECORD_NAMESPACE)
    assert "hunter" not in str(record)


async def test_links_into_a_store_are_followed_and_their_changes_seen(
    server: controlplanes.ApiServer, manifests: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    for version in ("1", "2"):
        write(store / version / "linked.yaml", config_map("linked", version=version))
        for file in (store / version / "linked.yaml", store / version):
            # As all in a Nix store.
            os.utime(file, (1, 1))
    (manifests / "file.yaml").symlink_to(store / "1" / "linked.yaml")
    (manifests / "directory").symlink_to(store / "1")
    async with deploying(deployer(server, manifests)) as made:
        await until(lambda: made.applied == ("directory/linked.yaml", "file.yaml"))
        assert server.get("configmap", "linked")["data"] == {"version": "1"}
        for name, target in (("file.yaml", store / "2" / "linked.yaml"), ("directory", store / "2")):
            (manifests / ".new").symlink_to(target)
            (manifests / ".new").rename(manifests / name)
        await until(lambda: server.get("configmap", "linked")["data"] == {"version": "2"})
        assert made.problems == {}


@pytest.mark.parametrize("label", [True, False], ids=["ours again", "somebody's"])
async def test_what_takes_the_place_of_an_object_that_is_deleted(
    server: controlplanes.ApiServer, manifests: Path, monkeypatch: pytest.MonkeyPatch, label: bool
) -> None:
    """It was looked at, and is another one when it is deleted: nothing goes that wasn't looked at."""
    name = "replaced-ours" if label else "replaced"
    write(manifests / "replaced.yaml", config_map(name), config_map("stays"))
    async with deploying(deployer(server, manifests)) as made:
        await until(lambda: made.applied)
        first = server.get("configmap", name)["metadata"]["uid"]
        looked: list[str] = []
        owner = kubectl.Kubectl.owner

        async def replaced(self: kubectl.Kubectl, which: objects.Object) -> objects.Owned | None:
            found = await owner(self, which)
            if found is not None and which.name == name and not looked:
                looked.append(found.uid)
                await asyncio.to_thread(server.kubectl, "delete", "configmap", name)
                await asyncio.to_thread(server.kubectl, "create", "configmap", name)
                if label:
                    marked = f"{objects.MADE_BY}=replaced.yaml"
                    await asyncio.to_thread(server.kubectl, "label", "configmap", name, marked)
            return found

        monkeypatch.setattr(kubectl.Kubectl, "owner", replaced)
        write(manifests / "replaced.yaml", config_map("stays", x="1"))
        await until(lambda: looked)
        await until(lambda: made.applied and server.get("configmap", "stays").get("data") == {"x": "1"})
        assert made.problems == {}
        assert looked == [first]
        assert gone(server, name) is label


async def test_a_file_that_is_touched_all_the_time_is_applied_and_one_that_changes_is_told(
    server: controlplanes.ApiServer, manifests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resting, "_PATIENCE", 3)
    write(manifests / "touched.yaml", config_map("touched", x="1"))
    write(manifests / "changing.yaml", config_map("changing"))
    write(manifests / "other.yaml", config_map("other"), config_map("other-goes"))
    ended = asyncio.Event()

    async def write_on() -> None:
        count = 0
        while not ended.is_set():
            count += 1
            os.utime(manifests / "touched.yaml")
            if not (manifests / "changing.yaml.skip").exists():
                write(manifests / "changing.yaml", config_map("changing", count=str(count)))
            await asyncio.sleep(0.1)

    writing = asyncio.create_task(write_on())
    try:
        async with deploying(deployer(server, manifests)) as made:
            await until(lambda: {"other.yaml", "touched.yaml"} <= set(made.applied))
            await until(lambda: made.problems == {"changing.yaml": resting.RESTLESS})
            # What only its times tell from what was applied is known again, and keeps nothing else.
            version = server.get("configmap", "touched")["metadata"]["resourceVersion"]
            (manifests / "changing.yaml.skip").touch()
            await until(lambda: made.problems == {})
            write(manifests / "other.yaml", config_map("other"))
            await until(lambda: gone(server, "other-goes"))
            write(manifests / "touched.yaml", config_map("touched", x="2"))
            await until(lambda: server.get("configmap", "touched")["data"] == {"x": "2"})
            assert version != server.get("configmap", "touched")["metadata"]["resourceVersion"]
    finally:
        ended.set()
        await writing


async def test_what_the_api_server_says_is_unavailable_keeps_no_other_manifest(
    server: controlplanes.ApiServer, manifests: Path, tmp_path: Path
) -> None:
    """It answers: what is away is what a manifest asks for, here by the word of a webhook."""
    with refusing_webhook(tmp_path) as (url, authority):
        rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["*"], "resources": ["configmaps"]}
        hook = {
            "name": "away.nixlet.test",
            "clientConfig": {"url": url, "caBundle": authority},
            "rules": [rule],
            "objectSelector": {"matchLabels": {objects.MADE_BY: "away.yaml"}},
            "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
        }
        kind = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration"}
        (tmp_path / "hook.json").write_text(json.dumps({**kind, "metadata": {"name": "away"}, "webhooks": [hook]}))
        server.kubectl("apply", "-f", str(tmp_path / "hook.json"))
        try:
            write(manifests / "away.yaml", config_map("away"))
            write(manifests / "behind.yaml", config_map("behind"))
            async with deploying(deployer(server, manifests)) as made:
                await until(lambda: "away.yaml" in made.problems)
                await until(lambda: made.applied == ("behind.yaml",))
                assert list(made.problems) == ["away.yaml"]
                assert "(ServiceUnavailable)" in made.problems["away.yaml"]
        finally:
            server.kubectl("delete", "validatingwebhookconfiguration", "away")


@contextlib.contextmanager
def refusing_webhook(directory: Path) -> Iterator[tuple[str, str]]:
    """A webhook that says of everything that it is unavailable; its URL, and its authority as Kubernetes takes it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = {"code": 503, "reason": "ServiceUnavailable", "message": "not now"}
            response = {"uid": asked["request"]["uid"], "allowed": False, "status": status}
            body = json.dumps({**asked, "response": response}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    certificate, key = directory / "hook.crt", directory / "hook.key"
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    argv += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(argv, check=True, capture_output=True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        listening.socket = context.wrap_socket(listening.socket, server_side=True)
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            authority = base64.b64encode(certificate.read_bytes()).decode()
            yield f"https://127.0.0.1:{listening.server_port}/", authority
        finally:
            listening.shutdown()
            thread.join()


async def test_an_api_server_that_is_away_is_told_and_waited_for(
    tmp_path: Path, manifests: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "another"
    directory.mkdir()
    another = controlplanes.ApiServer(directory)
    write(manifests / "late.yaml", config_map("late"))
    with contextlib.ExitStack() as stack:
        # Its certificate is there only once it was up.
        with another.running():
            pass
        async with deploying(deployer(another, manifests)) as made:
            await until(lambda: "the API server does not answer kubectl" in made.problems.get("", ""))
            assert list(made.problems) == [""]
            await asyncio.to_thread(stack.enter_context, another.running())
            await until(lambda: made.applied == ("late.yaml",))
            assert made.problems == {}
            await asyncio.to_thread(stack.close)
            write(manifests / "late.yaml", config_map("late", x="2"))
            await until(lambda: list(made.problems) == [""])
    told = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert all("does not answer" in record.getMessage() for record in told)
