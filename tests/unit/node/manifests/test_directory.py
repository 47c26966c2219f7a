import os
from pathlib import Path

import pytest

from nixlet.node.manifests import directory, objects


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def scanned(root: Path, *disabled: str) -> tuple[list[str], list[str], list[str]]:
    found = directory.scan(str(root), disabled)
    return sorted(found.wanted), sorted(found.disabled), sorted(found.skipped)


def test_manifests_are_known_by_their_endings(tmp_path: Path) -> None:
    touch(tmp_path, "a.yaml", "b.YML", "sub/deep/c.json", "d.txt", "e.yaml~", ".f.yaml", "yaml", "sub/.g.yml")
    assert scanned(tmp_path) == (["a.yaml", "b.YML", "sub/deep/c.json"], [], [])


def test_there_may_be_no_directory(tmp_path: Path) -> None:
    assert scanned(tmp_path / "none") == ([], [], [])


def test_skips_hold_by_name_wherever_they_are(tmp_path: Path) -> None:
    touch(tmp_path, "a.yaml", "a.yaml.skip", "b.yaml", "sub/c.yaml", "c.yaml.skip", "b.skip")
    assert scanned(tmp_path) == (["b.yaml"], [], ["a.yaml", "sub/c.yaml"])


def test_what_is_disabled_may_be_a_file_or_a_directory(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "coredns.yaml",
        "coredns.yaml.skip",
        "coredns-2.yaml",
        "metrics/a.yaml",
        "x/y/b.yaml",
        "x/c.yaml",
        "y/d.yaml",
    )
    assert scanned(tmp_path, "coredns", "metrics", "x/y") == (
        ["coredns-2.yaml", "x/c.yaml", "y/d.yaml"],
        ["coredns.yaml", "metrics/a.yaml", "x/y/b.yaml"],
        [],
    )


def test_links_to_directories_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "a.yaml", "sub/b.yaml")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "manifests")
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    (manifests / "link").symlink_to(tmp_path / "elsewhere")
    (manifests / "file.yaml").symlink_to(tmp_path / "elsewhere" / "a.yaml")
    (manifests / "dangling.yaml").symlink_to(tmp_path / "none")
    assert scanned(manifests) == (["file.yaml", "link/a.yaml", "link/sub/b.yaml"], [], [])


def test_a_link_that_leads_elsewhere_is_another_state_though_the_files_are_alike(tmp_path: Path) -> None:
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    for name in ("1", "2"):
        (tmp_path / name).write_text(f"content {name}")
        os.utime(tmp_path / name, (1, 1))
    (manifests / "a.yaml").symlink_to(tmp_path / "1")
    before = directory.scan(str(manifests), ()).wanted
    (manifests / "a.yaml").unlink()
    (manifests / "a.yaml").symlink_to(tmp_path / "2")
    assert directory.scan(str(manifests), ()).wanted != before


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("coredns.yaml", "coredns.yaml"),
        ("a" * 58 + ".yaml", "a" * 58 + ".yaml"),
        ("sub/coredns.yaml", "sub-coredns-yaml-"),
        ("sub-coredns.yaml", "sub-coredns.yaml"),
        ("Upper.yaml", "upper-yaml-"),
        ("a" * 80 + ".yaml", "a" * 52 + "-"),
        ("ä ö.yaml", "yaml-"),
        ("-.yaml", "yaml-"),
    ],
)
def test_labels_are_names_where_those_can_be_labels(name: str, label: str) -> None:
    made = directory.label(name)
    assert len(made) <= 63
    assert made == label or (label.endswith("-") and made.startswith(label) and len(made) == len(label) + 10)


def test_labels_tell_apart_what_looks_alike() -> None:
    names = ["a/b.yaml", "a-b.yaml", "A/b.yaml", "a b.yaml", "a/b.yml", "\udcff.yaml", "\udcfe.yaml"]
    assert len({directory.label(name) for name in names}) == len(names)


def test_objects_of_one_name_are_told_apart_by_group_and_not_by_version() -> None:
    text = """
    {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "a", "namespace": "n"}, "spec": {"x": 1.10}}
    {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "b"}}"""
    first, second = objects.written(text, "file.yaml")
    assert first.which == objects.Object("apps", "Deployment", "n", "a")
    assert '"x": 1.10' in first.text
    assert first.which.resource == "Deployment.apps"
    assert second.which == objects.Object("", "Secret", "", "b")
    assert second.which.resource == "Secret.v1."


@pytest.mark.parametrize(
    ("namespace", "kind", "found"),
    [("n", "A", True), ("", "A", True), ("m", "A", False), ("m", "B", True), ("", "C", False)],
)
def test_where_a_namespace_isnt_said_it_may_be_any(namespace: str, kind: str, found: bool) -> None:
    named = objects.Named((objects.Object("g", "A", "n", "x"), objects.Object("g", "B", "", "x")))
    assert (objects.Object("g", kind, namespace, "x") in named) is found


def test_a_record_is_read_as_it_was_written() -> None:
    made = frozenset((objects.Object("", "ConfigMap", "", "a"), objects.Object("apps", "Deployment", "n", "b")))
    record = objects.Record("sub/a.yaml", made)
    rendered = objects.render(record, directory.label(record.manifest))
    assert rendered == objects.render(
        objects.Record("sub/a.yaml", frozenset(sorted(made, reverse=True))), directory.label("sub/a.yaml")
    )
    assert objects.records(f'{{"items": [{rendered}]}}') == {"sub/a.yaml": record}
