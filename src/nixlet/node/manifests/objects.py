"""A manifest's objects as kubectl tells of them, and the record of what a manifest made, which is kept in the cluster."""

import json
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from nixlet import errors
from nixlet.encoding import unreadable
from nixlet.kubeclient import resources

#: The label of objects that a manifest made; its value is ``directory.label`` of the manifest's name.
MADE_BY = "nixlet.io/manifest"

#: The label of records, which are ConfigMaps in this namespace.
RECORD, RECORD_NAMESPACE = "nixlet.io/record", "kube-system"
_KIND_OF_RECORD = "manifest"

#: By which all records are found.
RECORDS = f"{RECORD}={_KIND_OF_RECORD}"


class Object(msgspec.Struct, frozen=True, order=True):
    """Which object: its kind with that kind's API group (versions are views of the same object), its namespace and its name.

    The namespace is as the manifest says it, perhaps empty, or as the API server does.
    """

    group: str
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        """As a person reads it."""
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"

    @property
    def resource(self) -> str:
        """Its kind as an argument of kubectl's, which is no other group's: the core group has no name, and one version."""
        return f"{self.kind}.{self.group}" if self.group else f"{self.kind}.v1."


class Named:
    """Objects that somebody names. Where a namespace isn't said it may be any: which kinds have one, the API server knows."""

    def __init__(self, which: Iterable[Object]) -> None:
        self._namespaces: dict[tuple[str, str, str], set[str]] = {}
        for each in which:
            self._namespaces.setdefault((each.group, each.kind, each.name), set()).add(each.namespace)

    def __contains__(self, which: Object) -> bool:
        """Whether an object may be one of them."""
        found = self._namespaces.get((which.group, which.kind, which.name), ())
        return bool(found) and (not which.namespace or which.namespace in found or "" in found)


class Written(NamedTuple):
    """An object as a manifest has it: which, and its text as JSON."""

    which: Object
    text: str


class Living(NamedTuple):
    """An object as the API server has it, with the number that no other one ever has."""

    which: Object
    uid: str


class Owned(NamedTuple):
    """An object that is there.

    Attributes:
        uid: The number that no other one ever has.
        version: The version of its API that it was found by, as in ``apiVersion``.
        label: The label of the manifest that made it; empty: none did.
    """

    uid: str
    version: str
    label: str


class Record(NamedTuple):
    """What a manifest made, or was about to make.

    Attributes:
        manifest: The manifest's name.
        objects: The objects.
    """

    manifest: str
    objects: frozenset[Object]


class _Metadata(msgspec.Struct):
    name: str = ""
    namespace: str = ""


class _Head(msgspec.Struct, rename="camel"):
    api_version: str = ""
    kind: str = ""
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)


class _ConfigMap(msgspec.Struct):
    data: dict[str, str] = {}


class _List(msgspec.Struct):
    items: list[_ConfigMap] = []


#: A template of kubectl's output by which it says of each object what ``living`` reads.
TEMPLATE = (
    '{{define "object"}}{{.apiVersion}}{{"\\t"}}{{.kind}}{{"\\t"}}{{with .metadata.namespace}}{{.}}{{end}}'
    '{{"\\t"}}{{.metadata.name}}{{"\\t"}}{{.metadata.uid}}{{"\\n"}}{{end}}'
    '{{if .items}}{{range .items}}{{template "object" .}}{{end}}{{else}}{{template "object" .}}{{end}}'
)

#: One by which it says an object's number, by which version of its API that was told, and which manifest made it.
TEMPLATE_OWNER = (
    f'{{{{.metadata.uid}}}}{{{{"\\t"}}}}{{{{.apiVersion}}}}{{{{"\\t"}}}}{{{{with .metadata.labels}}}}{{{{with index . "{MADE_BY}"}}}}'
    "{{.}}{{end}}{{end}}"
)

#: One by which it says of each group of the API whether who serves it is there.
TEMPLATE_SERVED = (
    '{{range .items}}{{with .spec.group}}{{.}}{{end}}{{"\\t"}}'
    '{{range .status.conditions}}{{if eq .type "Available"}}{{eq .status "True"}}{{end}}{{end}}{{"\\n"}}{{end}}'
)


class _Kind(msgspec.Struct):
    name: str = ""
    kind: str = ""
    namespaced: bool = False


class _Kinds(msgspec.Struct):
    resources: list[_Kind] = []


def resource(output: str, which: Object, version: str) -> resources.Resource | None:
    """How the API server calls an object's kind in paths, by what it says of a version of an API; None: it doesn't know it."""
    for each in msgspec.json.decode(output, type=_Kinds).resources:
        # (others are parts of objects: pods/log)
        if each.kind == which.kind and "/" not in each.name:
            return resources.Resource(version, each.name, each.namespaced)
    return None


def _group(api_version: str) -> str:
    return api_version.rpartition("/")[0]


def written(output: str, manifest: str) -> list[Written]:
    """The objects in a stream of JSON documents, as kubectl writes them.

    Args:
        output: The stream.
        manifest: What errors call it.

    Raises:
        InvalidArgumentError: One is no object that can be applied.
    """
    found: list[Written] = []
    decoder, place = json.JSONDecoder(), 0
    while (place := _skip_space(output, place)) < len(output):
        # (only to find its end: the text stays as kubectl wrote it)
        _, end = decoder.raw_decode(output, place)
        text = output[place:end]
        head = msgspec.json.decode(text, type=_Head)
        if not (head.api_version and head.kind and head.metadata.name):
            missing = "name" if head.kind and head.api_version else "apiVersion or kind"
            raise errors.InvalidArgumentError(
                f"object {len(found) + 1} of {manifest} has no {missing}",
                hint="each object of a manifest needs all three",
            )
        which = Object(_group(head.api_version), head.kind, head.metadata.namespace, head.metadata.name)
        found.append(Written(which, text))
        place = end
    return found


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def living(output: str) -> list[Living]:
    """The objects that kubectl tells of by ``TEMPLATE``."""
    found = []
    for line in output.splitlines():
        api_version, kind, namespace, name, uid = line.split("\t")
        found.append(Living(Object(_group(api_version), kind, namespace, name), uid))
    return found


def record_name(label: str) -> str:
    """The name of the record of a manifest whose objects have a label."""
    return f"nixlet-manifest-{label}"


def render(record: Record, label: str) -> str:
    """A record as an object for the cluster; the same bytes for the same record."""
    listed = msgspec.json.encode(sorted(record.objects)).decode()
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": record_name(label),
                "namespace": RECORD_NAMESPACE,
                "labels": {RECORD: _KIND_OF_RECORD},
            },
            "data": {"manifest": record.manifest, "objects": listed},
        }
    )


def records(output: str) -> dict[str, Record]:
    """The records in a list of ConfigMaps, by their manifests' names.

    Raises:
        FailedPreconditionError: Somebody changed one, so that it says nothing any more.
    """
    try:
        lists = msgspec.json.decode(output, type=_List).items
        read = (
            Record(each.data["manifest"], msgspec.json.decode(each.data["objects"], type=frozenset[Object]))
            for each in lists
        )
        return {record.manifest: record for record in read}
    except (*unreadable.JSON, KeyError) as error:
        raise errors.FailedPreconditionError(
            f"the cluster's record of what manifests made can't be read: {error}",
            hint=f"see kubectl -n {RECORD_NAMESPACE} get configmaps -l {RECORDS} -o yaml; one that is deleted is made anew,"
            " without what its manifest no longer names",
        ) from error
