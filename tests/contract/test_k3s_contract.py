"""What differs from k3s on purpose, held against the real containerds: drop-ins that they import, plugins, names of images."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nixlet.containerd import config, dropins, imagestore, k3s, proxyplugins, tomlread
from nixlet.host import process
from nixlet.images import archive, loader, platforms
from support import containerds, image_archives, parts

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
        proxies=(),
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
    ours = proxyplugins.ProxyPlugin("nix", f"{tmp_path}/nix.sock")
    proxied = config.tables(dataclasses.replace(settings, proxies=(ours,)))
    assert tomlread.at(proxied, ("proxy_plugins", "nix", "type")) == "snapshot"
    assert tomlread.at(proxied, ("plugins", k3s.NIX_PLUGIN)) is None


def image_archive(directory: Path, content: bytes) -> Path:
    layer = image_archives.tar({"content": content})
    path = directory / f"{content.decode()}.tar"
    path.write_bytes(
        image_archives.tar(image_archives.oci([layer], architecture=platforms.host_platform().architecture))
    )
    return path


@pytest.mark.parametrize("version", parts.CONTAINERDS)
async def test_a_name_that_a_person_gives_is_taken_and_an_archives_own_is_not(version: str, tmp_path: Path) -> None:
    """k3s's import takes all names of an archive away from those who have them."""
    async with containerds.running(version, tmp_path) as channel:
        store = containerds.store(channel)

        async def load(content: bytes, name: str) -> str:
            with archive.open_archive(str(image_archive(tmp_path, content))) as source:
                image = source.image(platforms.host_platform())
                assert image.names == ("docker.io/library/a:1",)
                await loader.Loader(store, containerds.SNAPSHOTTER).load(source, image, [name])
                return image.descriptor.digest

        async def named(name: str) -> str:
            image = await store.image(name)
            assert image is not None
            return image.target.digest

        first = await load(b"first", "localhost/a:1")
        assert await named("localhost/a:1") == first
        second = await load(b"second", "localhost/b:1")
        assert [await named(f"localhost/{each}:1") for each in "ab"] == [first, second]
        assert await store.image("docker.io/library/a:1") is None
        assert await load(b"second", "localhost/a:1") == await named("localhost/a:1") == second


@pytest.mark.parametrize("version", parts.CONTAINERDS)
async def test_a_pinned_image_keeps_its_label(version: str, tmp_path: Path) -> None:
    """The label is CRI's: kubelets don't collect what has it."""
    async with containerds.running(version, tmp_path) as channel:
        store = containerds.store(channel)
        with archive.open_archive(str(image_archive(tmp_path, b"pause"))) as source:
            image = source.image(platforms.host_platform())
            loads = loader.Loader(store, containerds.SNAPSHOTTER)
            await loads.load(source, image, ["localhost/pause:1"], labels=imagestore.PINNED)
            # Somebody who pulls it doesn't know of that.
            await loads.load(source, image, ["localhost/pause:1"], labels={"own": "label"})
        found = await store.image("localhost/pause:1")
        assert found is not None
        assert found.labels["io.cri-containerd.pinned"] == "pinned"
        assert found.labels["own"] == "label"
