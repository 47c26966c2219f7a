"""Names, labels and taints in Kubernetes' sense, and which labels a kubelet may give its node."""

import re
from collections.abc import Iterable, Iterator

from nixlet import errors
from nixlet.cluster import settings as model

_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_SUBDOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_MAX_NAME = 253

#: The part of a label's key after its domain, and a label's value (which may be empty, too).
_PART = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")

#: Domains that are Kubernetes' own, and what of them a kubelet may set (k8s.io/kubelet/pkg/apis, well_known_labels.go).
_RESERVED = ("kubernetes.io", "k8s.io")
_OF_KUBELETS = ("kubelet.kubernetes.io", "node.kubernetes.io")
_ALLOWED = frozenset(
    (
        "kubernetes.io/hostname", "kubernetes.io/os", "kubernetes.io/arch", "beta.kubernetes.io/os", "beta.kubernetes.io/arch",
        "beta.kubernetes.io/instance-type", "topology.kubernetes.io/zone", "topology.kubernetes.io/region",
        "failure-domain.beta.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/region",
    )
)  # fmt: skip


def is_name(text: str) -> bool:
    """Whether a text is a DNS subdomain in Kubernetes' sense (RFC 1123, small letters)."""
    return len(text) <= _MAX_NAME and _SUBDOMAIN.fullmatch(text) is not None


def is_key(text: str) -> bool:
    """Whether a text can be a label's key, or a taint's: a name, perhaps with a domain before it."""
    domain, slash, name = text.rpartition("/")
    return (not slash or is_name(domain)) and _PART.fullmatch(name) is not None


def is_value(text: str) -> bool:
    """Whether a text can be a label's value, or a taint's."""
    return not text or _PART.fullmatch(text) is not None


def label_problems(labels: Iterable[str]) -> Iterator[errors.InvalidArgumentError]:
    """What is wrong with labels that a node is to register with: a kubelet wouldn't start with them."""
    seen = set()
    for label in labels:
        key, equals, value = label.partition("=")
        if not equals or not is_key(key) or not is_value(value):
            yield errors.InvalidArgumentError(
                f"node-label {label!r} is no label",
                hint="write it as key=value, of letters, digits, -, _ and ., at most 63 of them each",
            )
            continue
        if key in seen:
            yield errors.InvalidArgumentError(f"node-label {key} is given more than once")
        seen.add(key)
        domain = key.rpartition("/")[0]
        if _is_below(domain, _RESERVED) and not _is_below(domain, _OF_KUBELETS) and key not in _ALLOWED:
            yield errors.InvalidArgumentError(
                f"node-label {key}: a kubelet may not label its node so",
                hint="use another domain, or label the node with kubectl",
            )


def _is_below(domain: str, domains: tuple[str, ...]) -> bool:
    return any(domain == each or domain.endswith(f".{each}") for each in domains)


def taint_problems(taints: Iterable[str]) -> Iterator[errors.InvalidArgumentError]:
    """What is wrong with taints that a node is to register with.

    Raises:
        InvalidArgumentError: One has another form than a taint, or no such effect.
    """
    seen = set()
    for text in taints:
        taint = model.taint(text)
        key, effect = taint["key"], taint["effect"]
        if not is_key(key) or not is_value(taint.get("value", "")):
            yield errors.InvalidArgumentError(
                f"node-taint {text!r} is no taint", hint="its key and value are made as those of labels are"
            )
        if (key, effect) in seen:
            yield errors.InvalidArgumentError(f"node-taint {key}:{effect} is given more than once")
        seen.add((key, effect))
