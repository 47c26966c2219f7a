"""Templates, drop-ins and the names of keys, held against the real containerd of each version."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from nixlet.containerd import config, misplaced, tomlread
from nixlet.host import process
from nixlet.node.children import rendering
from nixlet.node.settings import config as node_config
from support import parts

#: CRI's table for containers, by version.
CONTAINERD = {
    2: ("plugins", "io.containerd.grpc.v1.cri", "containerd"),
    3: ("plugins", "io.containerd.cri.v1.runtime", "containerd"),
    4: ("plugins", "io.containerd.cri.v1.runtime", "containerd"),
}


async def said(program: config.ContainerdProgram, *arguments: str) -> dict[str, Any]:
    done = (await process.run([program.path, *arguments], timeout=20)).check()
    assert "level=warn" not in done.stderr.decode().replace("Configuration migrated", "")
    return tomllib.loads(done.stdout.decode())


@pytest.mark.parametrize("with_base", [True, False], ids=["base", "whole"])
@pytest.mark.parametrize("version", parts.CONTAINERDS)
async def test_templates_and_drop_ins_arrive(version: str, with_base: bool, tmp_path: Path) -> None:
    program = await config.ask(str(parts.containerd(version)))
    layout = node_config.Layout(f"{tmp_path}/data", f"{tmp_path}/state")
    number = program.config_version
    directory = Path(layout.dropin_dir(number))
    directory.mkdir(parents=True)
    runtimes = tomlread.name((*CONTAINERD[number], "runtimes"))
    Path(layout.template(number)).write_text(
        ('{{ template "base" . }}\n' if with_base else f"version = {number}\n")
        + f'[{runtimes}.kata]\nruntime_type = "io.containerd.kata.v2"\nbase_runtime_spec = "{{{{ .Program }}}}"\n'
    )
    (directory / "10-kata.toml").write_text(
        f'version = {number}\n{runtimes}.kata.runtime_type = "io.containerd.kata.v3"\n'
    )
    (directory / "20-debug.toml").write_text('[debug]\nlevel = "debug"\n')
    file = rendering.write(
        node_config.Settings(default_runtime="kata" if with_base else ""),
        layout,
        program=program,
        runc="/usr/sbin/runc",
        cni_bin_dir="/usr/lib/cni",
    )
    dumped = await said(program, "--config", file, "config", "dump")
    containerd = tomlread.at(dumped, CONTAINERD[number])
    assert containerd["default_runtime_name"] == ("kata" if with_base else "runc")
    assert containerd["runtimes"]["kata"]["runtime_type"] == "io.containerd.kata.v3"
    assert containerd["runtimes"]["kata"]["base_runtime_spec"] == "nixlet"
    assert dumped["debug"]["level"] == "debug"
    # Whatever a template leaves out, the node's places are the node's.
    assert (dumped["root"], dumped["state"]) == (layout.containerd_root, layout.containerd_state)
    assert dumped["proxy_plugins"]["nix"]["address"] == layout.node_socket
    assert dumped["plugins"]["io.containerd.internal.v1.opt"]["path"] == layout.opt
    server = dumped if number < 4 else {"grpc": dumped["plugins"]["io.containerd.server.v1.grpc"]}
    assert server["grpc"]["address"] == layout.containerd_socket


#: As people have it for NVIDIA's runtime and for NRI, with Go's actions.
IN_THE_WILD = """
{{ template "base" . }}

{{- if .NodeConfig.AgentConfig.Snapshotter }}
[CONTAINERD]
  default_runtime_name = "nvidia"
{{- end }}

{{ range $name, $runtime := .ExtraRuntimes }}
[CONTAINERD.runtimes."{{ $name }}-copy"]
  runtime_type = {{ printf "%q" $runtime.RuntimeType }}
{{ end }}

[CONTAINERD.runtimes.nvidia]
  runtime_type = "io.containerd.runc.v2"
[CONTAINERD.runtimes.runc.options]
  BinaryName = "/opt/nvidia-container-runtime"
  SystemdCgroup = {{ .SystemdCgroup }}

[plugins."io.containerd.nri.v1.nri"]
  plugin_request_timeout = "9s"
"""


@pytest.mark.parametrize("version", parts.CONTAINERDS)
async def test_a_template_with_tables_that_the_base_has(version: str, tmp_path: Path) -> None:
    program = await config.ask(str(parts.containerd(version)))
    layout = node_config.Layout(f"{tmp_path}/data", f"{tmp_path}/state")
    number = program.config_version
    Path(layout.template(number)).parent.mkdir(parents=True)
    Path(layout.template(number)).write_text(IN_THE_WILD.replace("CONTAINERD", tomlread.name(CONTAINERD[number])))
    file = rendering.write(
        node_config.Settings(), layout, program=program, runc="/usr/sbin/runc", cni_bin_dir="/usr/lib/cni"
    )
    dumped = await said(program, "--config", file, "config", "dump")
    containerd = tomlread.at(dumped, CONTAINERD[number])
    assert containerd["default_runtime_name"] == "nvidia"
    assert containerd["runtimes"]["nvidia"]["runtime_type"] == "io.containerd.runc.v2"
    options = containerd["runtimes"]["runc"]["options"]
    assert options["BinaryName"] == "/opt/nvidia-container-runtime"
    # What the base says there, and the template doesn't, stays.
    assert options["Root"] == layout.runc_root
    if version != "1.6.20":
        nri = dumped["plugins"]["io.containerd.nri.v1.nri"]
        assert (nri["plugin_request_timeout"], nri["socket_path"]) == ("9s", layout.nri_socket)


async def test_keys_have_the_names_that_nixlet_says() -> None:
    """What ``misplaced`` says of where a key is, is so: the defaults of each version have it there, and nowhere else."""
    old, middle, new = [
        await said(await config.ask(str(parts.containerd(version))), "config", "default")
        for version in ("1.7.35", "2.2.9", "2.4.2")
    ]
    cri = "io.containerd.grpc.v1.cri"
    for written, right in misplaced._MOVED.items():
        assert tomlread.at(old, ("plugins", cri, *written)) is not None, written
        for default in (middle, new):
            assert tomlread.at(default, ("plugins", *right)) is not None, right
    for default in (middle, new):
        assert set(default["plugins"][cri]) == misplaced._STREAMING
    # All else of version 2's CRI went to the runtime plugin; but for the keys that are no more.
    gone = {"disable_cgroup", "systemd_cgroup", "enable_cdi"}
    moved = {written[0] for written in misplaced._MOVED if len(written) == 1} | misplaced._STREAMING | gone
    assert set(old["plugins"][cri]) - moved <= set(new["plugins"]["io.containerd.cri.v1.runtime"])
    for before, after in misplaced._RENAMED.items():
        assert before in old["plugins"]
        assert after not in old["plugins"]
        for default in (middle, new):
            assert after in default["plugins"]
            assert before not in default["plugins"]
    for name in misplaced._SERVERS:
        assert f"io.containerd.server.v1.{name}" in new["plugins"]
        assert f"io.containerd.server.v1.{name}" not in middle["plugins"]
        assert set(middle[name]) & {"address"} == set(new["plugins"][f"io.containerd.server.v1.{name}"]) & {"address"}
        assert set(new.get(name, {})) & misplaced._DEBUG_SERVER == set()
    assert tomlread.at(new, misplaced._HISTOGRAM) is not None
    tcp = {key.removeprefix("tcp_") for key in middle["grpc"] if key.startswith("tcp_")}
    assert tcp <= set(new["plugins"]["io.containerd.server.v1.grpc-tcp"])
