"""crictl's configuration."""

import yaml

from nixlet.containerd import crictl


def test_both_services_are_named() -> None:
    text = crictl.render(runtime_socket="/run/a b/containerd.sock", image_socket="/run/#x: y/nix.sock")
    assert yaml.safe_load(text) == {
        "runtime-endpoint": "unix:///run/a b/containerd.sock",
        "image-endpoint": "unix:///run/#x: y/nix.sock",
        "timeout": 600,
    }
