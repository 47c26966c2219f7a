"""Manifests that are refused: one exact sentence each, with the file, the line and the path of the field."""

import tracemalloc

import pytest

from nixlet import errors
from nixlet.encoding import yamlread
from nixlet.kube import manifest

TOP = "apiVersion: v1\nkind: Pod\n"
METADATA = TOP + "metadata:\n  name: small\n"
POD = METADATA + "spec:\n  containers:\n  - name: main\n    image: hello:1\n"
C = "spec.containers[0]"
PORTS = POD + "    ports: [{containerPort: 80, hostPort: 8080}"
OTHER = "]\n  - name: other\n    image: hello:1\n    ports: ["
TWICE = "line 6: spec.containers asks for port 8080 of the host"


def refusal(text: str | bytes) -> str:
    with pytest.raises(errors.UsageError) as caught:
        manifest.parse(text.encode() if isinstance(text, str) else text, "pod.yaml")
    assert caught.value.exit_code == 2
    return caught.value.message


def test_the_pod_that_the_cases_add_to_is_good() -> None:
    assert len(manifest.parse(POD.encode(), "pod.yaml")[0]) == 1


# The container's fields begin on line 9 of the manifest.
@pytest.mark.parametrize(
    ("field", "line", "sentence"),
    [
        ("livenessProbe: {exec: {command: [x]}}", 9, f"{C}.livenessProbe is not supported"),
        ("envFrom: []", 9, f"{C}.envFrom is not supported"),
        ("lifecycle: null", 9, f"{C}.lifecycle is not supported"),
        ('"a\\nb": x', 9, f"{C}.'a\\nb' is not supported"),
        (f"{'k' * 500}: x", 9, f"{C}.{'k' * 80!r} is not supported"),
        ("env:\n    - name: A\n      valueFrom: {}", 11, f"{C}.env[0].valueFrom is not supported"),
        ("env: [{name: Ä}]", 9, f"{C}.env[0].name 'Ä' is no name for an environment variable"),
        ("env: [{name: A=B}]", 9, f"{C}.env[0].name 'A=B' is no name for an environment variable"),
        ("env: [{value: x}]", 9, f"{C}.env[0].name is missing"),
        (
            "env: [{name: A, value: 1}]",
            9,
            f"{C}.env[0].value must be a string (in quotes, where it looks like a number)",
        ),
        ("env: {A: B}", 9, f"{C}.env must be a list"),
        ("env: [A]", 9, f"{C}.env[0] must be a mapping"),
        ("command: /bin/sh", 9, f"{C}.command must be a list"),
        ("args:\n    - a\n    - 5", 11, f"{C}.args must be a list of strings"),
        ('args: ["a\\0b"]', 9, f"{C}.args must not contain a NUL character"),
        ('workingDir: "/\\0"', 9, f"{C}.workingDir must not contain a NUL character"),
        ("tty: yeah", 9, f"{C}.tty must be true or false"),
        ("workingDir: yes", 9, f"{C}.workingDir must be a string (in quotes, where it looks like a truth value)"),
        ('tty: "true"', 9, f"{C}.tty must be true or false"),
        ("tty: !!bool maybe", 9, f"{C}.tty must be true or false"),
        (
            "imagePullPolicy: always",
            9,
            f"{C}.imagePullPolicy is 'always', which is none of Always, IfNotPresent, Never",
        ),
        ("ports: [{hostPort: 80}]", 9, f"{C}.ports[0].containerPort is missing"),
        ("ports: [{containerPort: 0}]", 9, f"{C}.ports[0].containerPort must be between 1 and 65535"),
        ("ports: [{containerPort: 65536}]", 9, f"{C}.ports[0].containerPort must be between 1 and 65535"),
        ("ports: [{containerPort: 0x1G}]", 9, f"{C}.ports[0].containerPort must be a whole number"),
        ("ports: [{containerPort: 1:20}]", 9, f"{C}.ports[0].containerPort must be a whole number"),
        ("ports: [{containerPort: 8.5}]", 9, f"{C}.ports[0].containerPort must be a whole number"),
        (f"ports: [{{containerPort: {'9' * 5000}}}]", 9, f"{C}.ports[0].containerPort must be a whole number"),
        (
            "ports: [{containerPort: 80, protocol: tcp}]",
            9,
            f"{C}.ports[0].protocol is 'tcp', which is none of TCP, UDP, SCTP",
        ),
        (
            "volumeMounts: [{name: data, mountPath: /d}]",
            9,
            f"{C}.volumeMounts[0].name is 'data', but the pod has no volume of that name",
        ),
        ("volumeMounts: [{name: data}]", 9, f"{C}.volumeMounts[0].mountPath is missing"),
        (
            "ports: [{containerPort: 80, hostIP: localhost}]",
            9,
            f"{C}.ports[0].hostIP is 'localhost', which is no IP address",
        ),
        (
            "ports: [{containerPort: 80, hostIP: 'fe80::1%eth0'}]",
            9,
            f"{C}.ports[0].hostIP is 'fe80::1%eth0', which is no IP address",
        ),
        (
            "resources:\n      requests: {memory: 1025Mi}\n      limits: {memory: 1Gi}",
            10,
            f"{C}.resources.requests.memory must not be more than the limit",
        ),
        (
            "resources: {limits: {cpu: 1}, requests: {cpu: 1001m}}",
            9,
            f"{C}.resources.requests.cpu must not be more than the limit",
        ),
        ("resources: {limits: {cpu: lots}}", 9, f"{C}.resources.limits.cpu is 'lots', which is no quantity"),
        ("resources: {limits: {cpu: -1}}", 9, f"{C}.resources.limits.cpu is '-1', which is negative"),
        ("resources: {requests: {memory: 10E}}", 9, f"{C}.resources.requests.memory is '10E', which is too large"),
        (
            "resources: {limits: {memory: 128m}}",
            9,
            f"{C}.resources.limits.memory is '128m', and a container needs 6Mi at least: that is 0.128 bytes: did you mean 128Mi?",
        ),
        ("resources: {limits: {cpu: [1]}}", 9, f"{C}.resources.limits.cpu must be a quantity"),
        ("resources: {limits: {nvidia.com/gpu: 1}}", 9, f"{C}.resources.limits.nvidia.com/gpu is not supported"),
        ("resources: {claims: []}", 9, f"{C}.resources.claims is not supported"),
        ("securityContext: {fsGroup: 1}", 9, f"{C}.securityContext.fsGroup is not supported"),
        ("securityContext: {runAsUser: -1}", 9, f"{C}.securityContext.runAsUser must be between 0 and 4294967294"),
        (
            "securityContext: {capabilities: {add: [net admin]}}",
            9,
            f"{C}.securityContext.capabilities.add has 'net admin', which is no capability (did you mean NET_ADMIN?)",
        ),
        (
            "securityContext: {capabilities: {drop: [NET_ROW]}}",
            9,
            f"{C}.securityContext.capabilities.drop has 'NET_ROW', which is no capability (did you mean NET_RAW?)",
        ),
        (
            "securityContext: {seccompProfile: {type: Localhost}}",
            9,
            f"{C}.securityContext.seccompProfile.type is 'Localhost', which is none of RuntimeDefault, Unconfined",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_a_containers_field(field: str, line: int, sentence: str) -> None:
    assert refusal(f"{POD}    {field}\n") == f"pod.yaml, line {line}: {sentence}"


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("hostUsers: false", "spec.hostUsers must be true: pods in user namespaces are not supported yet"),
        ("shareProcessNamespace: true", "spec.shareProcessNamespace is not supported"),
        ("securityContext: {fsGroup: 1}", "spec.securityContext.fsGroup is not supported"),
        (
            "securityContext: {supplementalGroups: [a]}",
            "spec.securityContext.supplementalGroups must be a list of whole numbers",
        ),
        (
            "securityContext: {supplementalGroups: [-1]}",
            "spec.securityContext.supplementalGroups must have numbers between 0 and 4294967294",
        ),
        (
            f"securityContext: {{supplementalGroups: [{'9' * 5000}]}}",
            "spec.securityContext.supplementalGroups must be a list of whole numbers",
        ),
        ("securityContext: {sysctls: [{name: a}]}", "spec.securityContext.sysctls[0].value is missing"),
        (
            "securityContext: {sysctls: [{name: a, value: b, x: y}]}",
            "spec.securityContext.sysctls[0].x is not supported",
        ),
        ("hostAliases: [{ip: x, hostnames: [a]}]", "spec.hostAliases[0].ip is 'x', which is no IP address"),
        ("hostAliases: [{ip: 192.0.2.1}]", "spec.hostAliases[0].hostnames is missing or empty"),
        (
            "hostAliases: [{ip: 192.0.2.1, hostnames: [a_b]}]",
            "spec.hostAliases[0].hostnames has 'a_b', which is no name of a host",
        ),
        ("restartPolicy: Sometimes", "spec.restartPolicy is 'Sometimes', which is none of Always, OnFailure, Never"),
        (
            f"restartPolicy: {'x' * 500}",
            f"spec.restartPolicy is '{'x' * 80}', which is none of Always, OnFailure, Never",
        ),
        (
            "dnsPolicy: None",
            "spec.dnsPolicy is 'None', which is none of Default, ClusterFirst, ClusterFirstWithHostNet",
        ),
        ("terminationGracePeriodSeconds: -1", "spec.terminationGracePeriodSeconds must be between 0 and 2147483647"),
        ("volumes: [{name: v}]", "spec.volumes[0] must be an emptyDir or a hostPath"),
        ("volumes: [{name: v, configMap: {name: x}}]", "spec.volumes[0].configMap is not supported"),
        (
            "volumes: [{name: v, emptyDir: {medium: Memory}}]",
            "spec.volumes[0].emptyDir.medium is 'Memory', which is not supported",
        ),
        ("volumes: [{name: v, emptyDir: {sizeLimit: 1Gi}}]", "spec.volumes[0].emptyDir.sizeLimit is not supported"),
        (
            "volumes: [{name: v, emptyDir: {}, hostPath: {path: /x}}]",
            "spec.volumes[0] must not be both an emptyDir and a hostPath",
        ),
        ("volumes: [{name: v, emptyDir: {}}, {name: v, emptyDir: {}}]", "spec.volumes has two volumes named v"),
        ("volumes: [{name: v, hostPath: {}}]", "spec.volumes[0].hostPath.path is missing"),
        (
            "volumes: [{name: v, hostPath: {path: srv}}]",
            "spec.volumes[0].hostPath.path must be an absolute path without '..'",
        ),
        (
            "volumes: [{name: v, hostPath: {path: /srv/../etc}}]",
            "spec.volumes[0].hostPath.path must be an absolute path without '..'",
        ),
        (
            'volumes: [{name: v, hostPath: {path: "/srv\\0"}}]',
            "spec.volumes[0].hostPath.path must not contain a NUL character",
        ),
        ("restartPolicy: Never\n  restartPolicy: Always", "spec.restartPolicy stands there twice"),
        ("[a, b]: c", "spec has a key that is no text"),
    ],
    ids=lambda value: value[:40],
)
def test_a_pods_field(field: str, sentence: str) -> None:
    line = 9 + field.count("\n")
    assert refusal(f"{POD}  {field}\n") == f"pod.yaml, line {line}: {sentence}"


def test_a_mount() -> None:
    pod = POD + "    volumeMounts:\n    - {name: v, mountPath: MOUNT}\n  volumes: [{name: v, emptyDir: {}}]\n"
    mount = f"pod.yaml, line 10: {C}.volumeMounts[0]"
    assert refusal(pod.replace("MOUNT", "'/a:ro'")) == f"{mount}.mountPath must not contain ':'"
    assert (
        refusal(pod.replace("{name: v, mountPath: MOUNT}", "{name: v, mountPath: /a}\n    - {name: v, mountPath: /a}"))
        == f"pod.yaml, line 9: {C}.volumeMounts has two mounts at /a"
    )
    assert refusal(pod.replace("MOUNT", "/a, subPath: b")) == f"{mount}.subPath is not supported"
    assert refusal(pod.replace("MOUNT", "/a, mountPropagation: None")) == f"{mount}.mountPropagation is not supported"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("kind: Pod\n", "line 1: apiVersion is missing"),
        ("apiVersion: v1\n", "line 1: kind is missing"),
        (TOP, "line 1: metadata is missing"),
        (METADATA, "line 1: spec is missing"),
        (TOP + "metadata: {}\nspec: {}\n", "line 3: metadata.name is missing"),
        (METADATA + "spec: {}\n", "line 5: spec.containers is missing or empty"),
        (METADATA + "spec:\n  container: []\n", "line 6: spec.container is not supported"),
        (METADATA + "spec:\n  containers: [{name: main,\n  imge: x}]\n", f"line 7: {C}.imge is not supported"),
        (METADATA.replace("metadata", "metadta") + "spec: {}\n", "line 3: metadta is not supported"),
        (METADATA + "spec:\n  containers: []\n", "line 6: spec.containers is missing or empty"),
        (METADATA + "spec:\n  containers: [{name: main}]\n", f"line 6: {C}.image is missing"),
        (METADATA + "spec:\n  containers: [{image: x, name: }]\n", f"line 6: {C}.name is missing"),
        (METADATA + "spec: []\n", "line 5: spec must be a mapping"),
        (METADATA + "  labels: {a: 1}\nspec: {}\n", "line 5: metadata.labels.a must be a string (in quotes, where it looks like a number)"),
        (METADATA + "  finalizers: []\nspec: {}\n", "line 5: metadata.finalizers is not supported"),
        ("- a\n", "line 1: the document must be a mapping"),
        ("just words\n", "line 1: the document must be a mapping"),
        (POD + "data: x\n", "line 9: data is not supported"),
        (POD.replace("kind: Pod", "kind: Deployment"), "line 1: the document is of kind Deployment (v1); only Pod (v1) is supported"),
        ("apiVersion: v1\nkind: List\nitems: []\n", "line 1: the document is of kind List (v1); only Pod (v1) is supported"),
        (POD.replace("v1", "v2", 1), "line 1: the document is of kind Pod (v2); only Pod (v1) is supported"),
        ('apiVersion: v1\nkind: "a\\nb"\n', "line 1: the document is of kind 'a\\nb' (v1); only Pod (v1) is supported"),
        (POD + "  - {name: main, image: z}\n", "line 6: spec.containers has two containers named main"),
        (POD + "  initContainers: [{name: main, image: z}]\n", "line 6: spec.containers has two containers named main"),
        (PORTS + OTHER + "{containerPort: 81, hostPort: 8080}]\n", f"{TWICE} (TCP) a second time"),
        (PORTS + ", {containerPort: 81, hostPort: 8080, hostIP: 127.0.0.1}" + "]\n", f"{TWICE} (TCP) a second time"),
    ],
)  # fmt: skip
def test_the_document(text: str, sentence: str) -> None:
    assert refusal(text) == f"pod.yaml, {sentence}"


@pytest.mark.parametrize("name", ["-a", "a-", "A", "a_b", "a..b", "a b", '"a\\n"', "ä", "a/b", "'..'", "a" * 254])
def test_names_outside_rfc_1123(name: str) -> None:
    plain = "a\n" if name.startswith('"') else name.strip("'")
    end = "only, begin and end with a letter or a digit, and have"
    pod = f"is {plain[:80]!r}: it must have lower-case letters, digits, '-' and '.' {end} 253 characters at most"
    label = f"is {plain[:80]!r}: it must have lower-case letters, digits and '-' {end} 63 characters at most"
    assert refusal(POD.replace("small", name)) == f"pod.yaml, line 4: metadata.name {pod}"
    assert refusal(POD.replace("name: main", f"name: {name}")) == f"pod.yaml, line 7: {C}.name {label}"
    assert refusal(f"{POD}  hostname: {name}\n") == f"pod.yaml, line 9: spec.hostname {label}"
    assert refusal(f"{POD}  runtimeClassName: {name}\n") == f"pod.yaml, line 9: spec.runtimeClassName {label}"
    volume = f"{POD}  volumes: [{{name: {name}, emptyDir: {{}}}}]\n"
    assert refusal(volume) == f"pod.yaml, line 9: spec.volumes[0].name {label}"
    namespace = POD.replace("small\n", f"small\n  namespace: {name}\n")
    assert refusal(namespace) == f"pod.yaml, line 5: metadata.namespace {label}"


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n---\n", "~\n", "null\n"])
def test_an_empty_stream(text: str) -> None:
    assert refusal(text) == "pod.yaml holds no pod"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (POD + "   bad: [\n", ", line 9, column 4"),
        ("a: 'b\n", ", line 2, column 1"),
        (POD + "\tx: 1\n", ", line 9, column 1"),
        ("a:\n\t- b\n", ", line 2, column 1"),
        ("a: b: c\n", ", line 1, column 5"),
        ("a: *nowhere\n", ", line 1, column 4"),
        ("%YAML 3.0\n---\na: b\n", ", line 1, column 1"),
        ('{"a": "\\ud800"}', ", line 1, column 10"),
        (POD.encode() + b"  hostname: \xff\n", ""),
        (POD.encode("latin-1") + "  hostname: ä\n".encode("latin-1"), ""),
        (POD + "    workingDir: a\x01b\n", ""),
        (b"\x00", ""),
        ("a: " + "[" * 100_000, ", line 1, column 1003"),
        ("- " * 100_000, ", line 1, column 1999"),
        ("a: " + "{a: " * 100_000, ", line 1, column 4000"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_what_is_no_yaml(text: str | bytes, place: str) -> None:
    sentence = refusal(text)
    assert sentence.startswith(f"pod.yaml{place}: this is no YAML: ")
    assert "\n" not in sentence
    assert len(sentence) < 150


def test_a_tag_of_python_is_no_value() -> None:
    tagged = POD + '    tty: !!python/object/apply:os.system ["true"]\n'
    assert refusal(tagged) == f"pod.yaml, line 9: {C}.tty must be true or false"


def test_a_manifest_that_is_too_large() -> None:
    assert refusal(b"#" * (yamlread.MAX_BYTES + 1)) == "pod.yaml is larger than 1048576 bytes"
    assert refusal(b"#" * yamlread.MAX_BYTES) == "pod.yaml holds no pod"


LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a0: &a0 [ha]\n" + LAUGHS, " has more than 50000 values"),
        ("a: &a [*a]\n", ", line 1, column 8: this is no YAML: the alias *a stands in what it stands for"),
        ("a: &a {b: *a, c: *a}\n", ", line 1, column 11: this is no YAML: the alias *a stands in what it stands for"),
        (f"a: &a [1]\nb: [{'*a,' * 49_000}*a]\n", " has more than 50000 values"),
    ],
    ids=["billion laughs", "an alias of itself", "two of them", "many of one"],
)
def test_small_texts_that_become_huge(text: str, problem: str) -> None:
    tracemalloc.start()
    try:
        assert refusal(text) == f"pod.yaml{problem}"
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_long_list() -> None:
    assert refusal(f"a: [{'x,' * 50_000}]\n") == "pod.yaml has more than 50000 values"
