"""What stargz-snapshotter is told."""

import base64
import json
import re
import tomllib
from pathlib import Path

import pytest

from nixlet.containerd import registries
from nixlet.containerd.rewrites import Rewrite
from nixlet.node.children import stargz
from nixlet.node.requirements import plugins
from nixlet.node.settings import config


@pytest.fixture
def layout(tmp_path: Path) -> config.Layout:
    return config.Layout(f"{tmp_path}/data", f"{tmp_path}/state")


def written(layout: config.Layout, said: registries.Registries) -> tuple[dict[str, object], dict[str, object]]:
    plugin = plugins.of(config.Settings(snapshotter="stargz"), layout)
    assert plugin is not None
    Path(layout.containerd_root).mkdir(parents=True)
    environment = stargz.write(plugin, layout, said)
    logins = Path(environment["DOCKER_CONFIG"]) / "config.json"
    for path in (Path(plugins.stargz_config(layout)), logins):
        assert path.stat().st_mode & 0o777 == 0o600
    assert logins.parent.stat().st_mode & 0o777 == 0o700
    return tomllib.loads(Path(plugins.stargz_config(layout)).read_text()), json.loads(logins.read_text())


def test_without_a_word_on_registries(layout: config.Layout) -> None:
    found, logins = written(layout, registries.Registries())
    assert found == {
        "metadata_store": "memory",
        "no_prometheus": True,
        "cri_keychain": {"enable_keychain": True, "image_service_path": layout.containerd_socket},
        "snapshotter": {"allow_invalid_mounts_on_restart": True},
    }
    assert logins == {"auths": {}}


def test_mirrors_and_credentials(layout: config.Layout, caplog: pytest.LogCaptureFixture) -> None:
    mirror = registries.Mirror
    said = registries.Registries(
        mirrors={
            "docker.io": mirror(("https://m.example", "http://127.0.0.1:5000", "https://m.example/with/path")),
            "r.example": mirror(("https://m.example",), (Rewrite(re.compile("a"), "b"),)),
            "*": mirror(("https://every.example",)),
        },
        configs={
            "docker.io": registries.HostConfig(registries.Auth("ada", "secret")),
            "r.example:5000": registries.HostConfig(registries.Auth(identity_token="token")),
            "plain.example": registries.HostConfig(),
        },
    )
    found, logins = written(layout, said)
    hosts = [{"host": "m.example", "insecure": False}, {"host": "127.0.0.1:5000", "insecure": True}]
    assert found["resolver"] == {"host": {"docker.io": {"mirrors": hosts}}}
    assert caplog.text.count("stargz can't ask") == 3
    assert logins["auths"] == {
        "https://index.docker.io/v1/": {"auth": base64.b64encode(b"ada:secret").decode()},
        "r.example:5000": {"identitytoken": "token"},
    }
