"""What is changed in a container's specification so that it has no network, and what isn't."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet import errors
from nixlet.pods import nonetwork

SYSCTLS = {"net.ipv4.ip_unprivileged_port_start": "0"}

#: What CRI writes, with a number and an escape that Python's own way of writing JSON would change.
SPEC = (
    b'{"ociVersion":"1.2.0","process":{"args":["a\\u0026b"],"selinuxLabel":"s0"},"hostname":"old","later":1e+06,'
    b'"linux":{"uidMappings":[{"containerID":0}],"sysctl":{"net.a":"1"},"seccomp":{"x":[1.50]},'
    b'"namespaces":[{"type":"pid"},{"type":"network","path":"/proc/1/ns/net"},{"type":"ipc","path":"/proc/1/ns/ipc"},'
    b'{"type":"uts","path":"/proc/1/ns/uts"}]}}'
)


def test_only_the_namespaces_the_name_and_the_settings_change() -> None:
    assert nonetwork.separated(SPEC, "web", SYSCTLS) == (
        b'{"ociVersion":"1.2.0","process":{"args":["a\\u0026b"],"selinuxLabel":"s0"},"hostname":"web","later":1e+06,'
        b'"linux":{"uidMappings":[{"containerID":0}],'
        b'"sysctl":{"net.ipv4.ip_unprivileged_port_start":"0","net.a":"1"},"seccomp":{"x":[1.50]},'
        b'"namespaces":[{"type":"pid"},{"type":"ipc","path":"/proc/1/ns/ipc"},{"type":"network"},{"type":"uts"}]}}'
    )


@pytest.mark.parametrize("spec", [{}, {"linux": {}}, {"linux": {"namespaces": [{"type": "mount"}]}}])
def test_what_has_no_such_namespace_gets_one(spec: dict[str, Any]) -> None:
    changed = json.loads(nonetwork.separated(json.dumps(spec).encode(), "web", {}))
    assert [each for each in changed["linux"]["namespaces"] if each["type"] != "mount"] == [
        {"type": "network"},
        {"type": "uts"},
    ]
    assert changed["hostname"] == "web"


def test_a_setting_of_its_own_stays() -> None:
    spec = json.dumps({"linux": {"sysctl": dict.fromkeys(SYSCTLS, "80")}}).encode()
    assert json.loads(nonetwork.separated(spec, "web", SYSCTLS))["linux"]["sysctl"] == dict.fromkeys(SYSCTLS, "80")


@pytest.mark.parametrize(
    "spec",
    [
        b"",
        b"[]",
        b'{"linux":null}',
        b'{"linux":{"namespaces":null}}',
        b'{"linux":{"namespaces":[1]}}',
        b'{"linux":{"namespaces":[{}]}}',
        b'{"linux":{"namespaces":[{"type":"\\ud800"}]}}',
        b'{"linux":{"sysctl":null}}',
        b'{"linux":{"sysctl":{"net.a":1}}}',
    ],
)
def test_what_is_no_specification_is_refused(spec: bytes) -> None:
    with pytest.raises(errors.UnsupportedError, match="the container's specification is not as OCI has it"):
        nonetwork.separated(spec, "web", SYSCTLS)


PARTS = st.dictionaries(
    st.text(max_size=9).filter(lambda key: key not in {"hostname", "linux", "namespaces", "sysctl"}),
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.lists(st.text(max_size=9), max_size=2),
    max_size=3,
)


@given(PARTS, PARTS)
def test_unknown_parts_stay(whole: dict[str, Any], linux: dict[str, Any]) -> None:
    changed = json.loads(nonetwork.separated(json.dumps({**whole, "linux": linux}).encode(), "web", SYSCTLS))
    added = {"namespaces": [{"type": "network"}, {"type": "uts"}], "sysctl": SYSCTLS}
    assert changed == {**whole, "hostname": "web", "linux": {**linux, **added}}
