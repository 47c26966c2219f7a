"""Why drop-ins are merged by us: what the real containerds make of the same files when they import them, as k3s has them do."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nixlet.containerd import config, dropins, k3s, tomlread
from nixlet.host import process
from support import parts

#: A runtime and a directory beside those that the base has.
DROP_IN = """
version = {version}
[plugins."{plugin}".cni]
conf_dir = "/own"
[plugins."{plugin}".containerd.runtimes.own]
runtime_type = "io.containerd.runc.v2"
"""


def settings_for(version: int, directory: Path) -> config.ContainerdSettings:
    return config.ContainerdSettings(
        version=version,
        root=f"{directory}/root",
        state=f"{directory}/state",
        address=f"{directory}/c.sock",
        opt_dir=f"{directory}/opt",
        snapshotter="overlayfs",
        snapshotter_address="",
        snapshotter_root="",
        sandbox_image="localhost/pause:1",
        cni_bin_dir="/usr/lib/cni",
        cni_conf_dir=f"{directory}/net.d",
        runc="/usr/sbin/runc",
        runc_root=f"{directory}/runc",
        nri_socket=f"{directory}/nri.sock",
        restrict_oom_score_adj=False,
        architecture="amd64",
        nonroot_devices=True,
    )


async def runtime_of(program: config.ContainerdProgram, file: Path, plugin: str) -> dict[str, Any]:
    """CRI's table for containers in what a containerd makes of a file."""
    done = (await process.run([program.path, "--config", str(file), "config", "dump"], timeout=20)).check()
    found = tomllib.loads(done.stdout.decode())["plugins"][plugin]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("version", parts.CONTAINERDS)
async def test_drop_ins_add_to_the_base_whatever_containerd_makes_of_imports(version: str, tmp_path: Path) -> None:
    program = await config.ask(str(parts.containerd(version)))
    number = min(program.config_version, max(k3s.VERSIONS))
    plugin = "io.containerd.grpc.v1.cri" if number == 2 else "io.containerd.cri.v1.runtime"
    settings = settings_for(number, tmp_path)
    directory, text = tmp_path / "d", DROP_IN.format(version=number, plugin=plugin)
    directory.mkdir()
    (directory / "10-own.toml").write_text(text)

    imported = tmp_path / "imported.toml"
    imported.write_text(config.dump(k3s.tables(settings, str(directory)), number))
    theirs = await runtime_of(program, imported, plugin)
    # Version 1 takes the drop-in's table of a plugin for the whole: runc is gone, and all that the base said of CRI.
    whole = version.startswith("1.")
    assert set(theirs["containerd"]["runtimes"]) == {"own", *(() if whole else ("runc", "runhcs-wcow-process"))}
    assert theirs["device_ownership_from_security_context"] is (not whole)
    assert theirs["cni"]["conf_dir"] == "/own"

    merged = tmp_path / "merged.toml"
    table = dropins.merged(config.tables(settings), [dropins.DropIn("10-own.toml", tomllib.loads(text))])
    merged.write_text(config.dump(table, number))
    ours = await runtime_of(program, merged, plugin)
    assert set(ours["containerd"]["runtimes"]) == {"own", "runc"}
    assert ours["device_ownership_from_security_context"] is True
    assert ours["cni"]["conf_dir"] == "/own"


@pytest.mark.parametrize("version", parts.CONTAINERDS)
async def test_drop_ins_may_be_none(version: str, tmp_path: Path) -> None:
    """k3s doesn't make the directory: a pattern that nothing fits is no mistake."""
    program = await config.ask(str(parts.containerd(version)))
    number = min(program.config_version, max(k3s.VERSIONS))
    file = tmp_path / "config.toml"
    file.write_text(config.dump(k3s.tables(settings_for(number, tmp_path), f"{tmp_path}/none"), number))
    done = (await process.run([program.path, "--config", str(file), "config", "dump"], timeout=20)).check()
    assert tomllib.loads(done.stdout.decode())["root"] == f"{tmp_path}/root"


@pytest.mark.parametrize("version", parts.CONTAINERDS)
async def test_no_installed_containerd_has_k3ss_nix_plugin(version: str, tmp_path: Path) -> None:
    """Which is why ours is a proxy plugin, and why k3s's table is warned of."""
    program = await config.ask(str(parts.containerd(version)))
    done = (await process.run([program.path, "config", "default"], timeout=20)).check()
    plugins = tomllib.loads(done.stdout.decode())["plugins"]
    assert k3s.NIX_PLUGIN not in plugins
    assert "io.containerd.snapshotter.v1.overlayfs" in plugins
    settings = dataclasses.replace(settings_for(program.config_version, tmp_path), snapshotter="nix")
    proxied = config.tables(dataclasses.replace(settings, snapshotter_address=f"{tmp_path}/nix.sock"))
    assert tomlread.at(proxied, ("proxy_plugins", "nix", "type")) == "snapshot"
    assert tomlread.at(proxied, ("plugins", k3s.NIX_PLUGIN)) is None
