"""The rendered configuration, loaded by the real containerd of each version, which is then started and asked."""

import asyncio
import dataclasses
import hashlib
import itertools
import os
import re
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.containerd import cni, config, cri, imagestore, k3s, proxyplugins, runtimes
from nixlet.host import process
from nixlet.node.children import containerd_child
from nixlet.node.settings import config as node_config
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import (
    containerd_content_grpc,
    containerd_content_pb2,
    containerd_leases_grpc,
    containerd_leases_pb2,
    cri_grpc,
    cri_pb2,
)
from support import image_archives, parts

# An overlay on the root directory, in a mount namespace of its own: what a program changes outside of its directory $1 is
# found in $over/upper, and what lies in $1/bait seems to be the system's.
BOX = """
own=$1; over=$own/over; shift
mkdir $over; mount -t tmpfs none $over; mkdir $over/work $over/root; cp -a $own/bait $over/upper
mount -t overlay none -o lowerdir=/,upperdir=$over/upper,workdir=$over/work $over/root
for each in proc sys dev; do mount --rbind /$each $over/root/$each; done
mount --bind $own $over/root$own
exec chroot $over/root "$@"
"""

#: The system's own, none of which is ours: a plugin that leaves a trace, and a drop-in that no containerd can read.
BAIT = {
    "opt/nri/plugins/10-bait": "#!/bin/sh\ntouch /bait-was-taken\n",
    "etc/containerd/conf.d/bait.toml": "this is no TOML [",
}

#: What containerd warns of because of the machine, whatever its configuration.
OF_THE_MACHINE = re.compile("fsverity|devmapper|blockfile|btrfs|zfs|erofs|cgroup")


#: The snapshotters of the golden files; zfs stands for all names that nixlet knows nothing of.
SNAPSHOTTERS = ("nix", "overlayfs", "native", "stargz", "zfs")

#: What version 1.6 doesn't know of a version 2 that 1.7 shares with it. It passes these tables and keys over, and asks for the
#: directory of a proxy plugin's exports at the very place where ours is.
UNKNOWN_TO_1_6 = {
    ("plugins", "io.containerd.nri.v1.nri"),
    ("plugins", "io.containerd.service.v1.tasks-service", "blockio_config_file"),
    ("plugins", "io.containerd.transfer.v1.local"),
    *((("proxy_plugins", name, key)) for name in SNAPSHOTTERS for key in ("capabilities", "exports")),
}


def proxies_for(snapshotter: str, directory: Path) -> tuple[proxyplugins.ProxyPlugin, ...]:
    """Snapshotters that are programs of their own."""
    root = f"{directory}/root/io.containerd.snapshotter.v1.nix"
    made = (
        proxyplugins.ProxyPlugin("nix", f"{directory}/state/nix.sock", root, ("remap-ids",), reads_annotations=True),
        proxyplugins.ProxyPlugin("stargz", config.STARGZ_SOCKET, reads_annotations=True, asks_registries=True),
    )
    return tuple(each for each in made if each.name == snapshotter)


def settings_for(
    version: int, directory: Path, snapshotter: str = "nix", *, full: bool = False
) -> config.ContainerdSettings:
    """A node's settings; ``full``: with everything that a node can have."""
    plain = config.ContainerdSettings(
        version=version,
        root=f"{directory}/root",
        state=f"{directory}/state",
        address=f"{directory}/state/c.sock",
        opt_dir=f"{directory}/opt",
        snapshotter=snapshotter,
        proxies=proxies_for(snapshotter, directory),
        sandbox_image="localhost/nixlet/pause:1",
        cni_bin_dir="/usr/lib/cni",
        cni_conf_dir=f"{directory}/net.d",
        runc="/usr/sbin/runc",
        runc_root=f"{directory}/state/runc",
        nri_socket=f"{directory}/state/nri.sock",
        restrict_oom_score_adj=True,
        architecture="amd64",
        certs_dir=f"{directory}/certs.d",
    )
    if not full:
        return plain
    return dataclasses.replace(
        plain,
        auths={"r.example:5000": {"username": "me", "password": "secret"}, "other.example": {"identitytoken": "token"}},
        default_runtime="crun",
        runtimes={
            "crun": runtimes.Runtime("io.containerd.runc.v2", "/usr/bin/crun"),
            "wasmtime": runtimes.Runtime("io.containerd.wasmtime.v1", "/opt/kwasm/bin/containerd-shim-wasmtime-v1"),
        },
        enable_selinux=True,
        nonroot_devices=True,
        in_user_namespace=True,
        disable_cgroup=version == 2,
        systemd_cgroup=True,
        blockio_config=f"{directory}/blockio_config.yaml",
        rdt_config=f"{directory}/rdt_config.yaml",
    )


def leaves(table: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(table, dict):
        return {key: value for name, child in table.items() for key, value in leaves(child, (*path, name)).items()}
    if isinstance(table, list) and table and isinstance(table[0], dict):
        return {k: v for number, child in enumerate(table) for k, v in leaves(child, (*path, str(number))).items()}
    return {path: table}


async def dump(program: config.ContainerdProgram, file: Path) -> tuple[dict[str, Any], list[str]]:
    """What a containerd makes of a file, and what it warns of."""
    done = (await process.run([program.path, "--config", str(file), "config", "dump"], timeout=20)).check()
    warnings = [line for line in done.stderr.decode().splitlines() if re.search(r"level=(warn|error)", line)]
    return tomllib.loads(done.stdout.decode()), warnings


def lost(program: config.ContainerdProgram, rendered: dict[str, Any], dumped: dict[str, Any]) -> dict[Any, Any]:
    """The values of a file that a containerd which should know them does not have."""
    found = leaves(dumped)
    missing = {path: value for path, value in leaves(rendered).items() if found.get(path) != value}
    unknown = UNKNOWN_TO_1_6 if program.version.startswith("1.6.") else set()
    return {path: value for path, value in missing.items() if not unknown & {path[:2], path[:3]}}


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("snapshotter", SNAPSHOTTERS)
@pytest.mark.parametrize("version", parts.CONTAINERDS)
async def test_every_value_arrives_and_nothing_is_warned_of(
    version: str, snapshotter: str, full: bool, tmp_path: Path
) -> None:
    program = await config.ask(str(parts.containerd(version)))
    assert program.version == version
    assert program.config_version == {"1": 2, "2": 4 if version >= "2.3" else 3}[version[0]]
    file = tmp_path / "config.toml"
    file.write_text(config.render(settings_for(program.config_version, tmp_path, snapshotter, full=full)))
    dumped, warnings = await dump(program, file)
    assert warnings == []
    rendered = tomllib.loads(file.read_text())
    assert lost(program, rendered, dumped) == {}
    # A plugin that it has not would be in the dump all the same.
    default = (await process.run([program.path, "config", "default"], timeout=20)).check().stdout.decode()
    unknown = {("plugins", name) for name in rendered["plugins"].keys() - tomllib.loads(default)["plugins"].keys()}
    assert unknown == (UNKNOWN_TO_1_6 & unknown if version.startswith("1.6.") else set())
    # What is not ours must not be taken up from the system's directory either.
    assert not [path for path, value in leaves(dumped).items() if value == "/run/containerd/containerd.sock"]


@pytest.mark.parametrize("snapshotter", SNAPSHOTTERS)
@pytest.mark.parametrize("version", parts.CONTAINERDS)
async def test_what_k3s_renders_is_understood(version: str, snapshotter: str, tmp_path: Path) -> None:
    program = await config.ask(str(parts.containerd(version)))
    number = min(program.config_version, max(k3s.VERSIONS))
    settings = settings_for(number, tmp_path, snapshotter, full=True)
    file = tmp_path / "config.toml"
    rendered = k3s.tables(settings, f"{tmp_path}/config-v3.toml.d")
    file.write_text(config.dump(rendered, number))
    dumped, warnings = await dump(program, file)
    # containerd 2.4 takes version 3 for version 4, and says so.
    assert [line for line in warnings if "migrated from version 3" not in line] == []
    if program.config_version > number:
        del rendered["version"], rendered["grpc"]
    # k3s's containerd alone has plugins of these names; what is imported each version tells in its own way.
    del rendered["imports"]
    for plugin in ("nix", "stargz"):
        rendered["plugins"].pop(f"io.containerd.snapshotter.v1.{plugin}", None)
    assert lost(program, rendered, dumped) == {}


@pytest.mark.parametrize(("version", "number"), [("2.2.9", 2), ("2.4.2", 2), ("2.4.2", 3)])
async def test_an_older_version_stays_away_from_the_system_too(version: str, number: int, tmp_path: Path) -> None:
    program = await config.ask(str(parts.containerd(version)))
    file = tmp_path / "config.toml"
    file.write_text(config.render(settings_for(number, tmp_path)))
    dumped, warnings = await dump(program, file)
    assert [line for line in warnings if "migrated from version" not in line] == []
    values = {value for value in leaves(dumped).values() if isinstance(value, str)}
    assert {f"{tmp_path}/state/c.sock", f"{tmp_path}/state/nri.sock", f"{tmp_path}/opt"} <= values
    assert {"/run/containerd/containerd.sock", "/var/run/nri/nri.sock", "/opt/containerd"} & values == set()


GOLDEN = Path(__file__).parent / "golden"


def golden_files() -> dict[str, str]:
    """The name of each golden file, and its text."""
    texts = {}
    for snapshotter, version in itertools.product(SNAPSHOTTERS, config.VERSIONS):
        for full in (False, True) if snapshotter in {"nix", "overlayfs"} else (False,):
            settings = settings_for(version, Path("/n"), snapshotter, full=full)
            name = f"v{version}-{snapshotter}{'-full' if full else ''}.toml"
            texts[f"containerd-{name}"] = config.render(settings)
            if version in k3s.VERSIONS:
                dropins = f"/n/{config.stem(version)}.toml.d"
                texts[f"k3s-{name}"] = config.dump(k3s.tables(settings, dropins), version)
    return texts


@pytest.mark.parametrize("name", golden_files())
def test_the_rendered_files_are_as_committed(name: str) -> None:
    assert golden_files()[name] == (GOLDEN / name).read_text(), f"if this is meant, write {name} anew"


def test_no_golden_file_is_left_over() -> None:
    assert {file.name for file in GOLDEN.glob("*.toml")} == set(golden_files())


@dataclasses.dataclass(frozen=True)
class Boxed:
    """A containerd that runs with a rendered configuration, and nothing of which gets out."""

    program: config.ContainerdProgram
    directory: Path
    child: process.Child

    @property
    def address(self) -> str:
        return f"{self.directory}/state/c.sock"

    async def changed(self) -> set[str]:
        """The files, sockets and links that it made, changed or removed outside of its directory."""
        argv = ["nsenter", f"--target={self.child.pid}", "--mount", "find", f"{self.directory}/over/upper"]
        found = (await process.run([*argv, "!", "-type", "d", "-printf", "%P\n"], timeout=20)).check()
        return set(found.stdout.decode().split("\n")) - {"", *BAIT}

    def warnings(self) -> list[str]:
        lines = (self.directory / "log").read_text().splitlines()
        return [line for line in lines if "level=info" not in line and not OF_THE_MACHINE.search(line)]


@pytest.fixture(params=parts.CONTAINERDS)
async def boxed(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Boxed]:
    program = await config.ask(str(parts.containerd(request.param)))
    (tmp_path / "config.toml").write_text(config.render(settings_for(program.config_version, tmp_path)))
    network = cni.render(name="nixlet", bridge="nixtest0", pod_cidr="10.163.0.0/24", data_dir=f"{tmp_path}/cni")
    (tmp_path / "net.d").mkdir()
    (tmp_path / "net.d" / cni.FILE_NAME).write_text(network)
    for name, text in BAIT.items():
        bait = tmp_path / "bait" / name
        bait.parent.mkdir(parents=True)
        bait.write_text(text)
        bait.chmod(0o755)
    argv = ["unshare", "--mount", "--propagation=private", "sh", "-euc", BOX, "sh", str(tmp_path)]
    argv += [program.path, f"--config={tmp_path}/config.toml"]
    with (tmp_path / "log").open("wb") as log:
        async with (
            process.start(argv, stdout=log.fileno(), stderr=log.fileno(), grace=20) as child,
            channels.connect(f"{tmp_path}/state/c.sock") as channel,
        ):
            ready = asyncio.create_task(channels.wait_until_answered(cri.RuntimeClient(channel, "c.sock").version))
            ended = asyncio.create_task(child.wait())
            try:
                await asyncio.wait({ready, ended}, timeout=30, return_when=asyncio.FIRST_COMPLETED)
                assert ready.done(), (tmp_path / "log").read_text()
                yield Boxed(program, tmp_path, child)
            finally:
                for task in (ready, ended):
                    task.cancel()
                await asyncio.wait({ready, ended})
    assert child.returncode == 0


async def test_it_starts_without_a_warning_and_stays_in_its_directories(boxed: Boxed) -> None:
    async with channels.connect(boxed.address) as channel:
        version = await cri.RuntimeClient(channel, boxed.address).version()
        assert (version.runtime_name, version.runtime_api_version) == ("containerd", "v1")
        status = (await cri_grpc.RuntimeServiceStub(channel).Status(cri_pb2.StatusRequest())).status
        # The network is ready when the CNI configuration was read.
        ready = {each.type for each in status.conditions if each.status}
        assert {"RuntimeReady", "NetworkReady"} <= ready, status
    assert boxed.warnings() == []
    assert await boxed.changed() == set()
    sockets = {each.name for each in (boxed.directory / "state").iterdir() if each.is_socket()}
    assert sockets == {"c.sock", "c.sock.ttrpc", *(["nri.sock"] if boxed.program.config_version > 2 else [])}


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 700_000):
        yield data[start : start + 700_000]


async def test_content(boxed: Boxed) -> None:
    # Pieces of more than a message may have, and of less.
    big, other = os.urandom(2_500_000), b"other"
    digest = image_archives.digest(big)
    async with channels.connect(boxed.address) as channel:
        contents = containerd_content_grpc.ContentStub(channel)

        async def labels(digest: str) -> dict[str, str]:
            request, metadata = containerd_content_pb2.InfoRequest(digest=digest), {"containerd-namespace": "k8s.io"}
            return dict((await contents.Info(request, metadata=metadata)).info.labels)

        async with imagestore.ImageStore(channel, boxed.address).leased() as store:
            with pytest.raises(errors.NotFoundError):
                await store.read_content(digest, 8 << 20)
            await store.write_content(digest, len(big), lambda: pieces(big), {"a": "1"})
            assert hashlib.sha256(await store.read_content(digest, 8 << 20)).digest() == hashlib.sha256(big).digest()
            # Of what is larger than was expected no more than that; and the connection goes on.
            for most in (1, 700_000, len(big) - 1):
                assert await store.read_content(digest, most) == big[:most]
            assert (await labels(digest))["a"] == "1"
            # A second time it only gets the labels.
            await store.write_content(digest, len(big), lambda: pieces(big), {"b": "2"})
            assert {"a": "1", "b": "2"}.items() <= (await labels(digest)).items()
            with pytest.raises(errors.NixletError, match="unexpected commit digest"):
                await store.write_content(image_archives.digest(b"wrong"), len(other), lambda: pieces(other), {})
            with pytest.raises(errors.NixletError, match="size"):
                await store.write_content(image_archives.digest(other), len(other) + 1, lambda: pieces(other), {})
            with pytest.raises(errors.NotFoundError):
                await store.read_content(image_archives.digest(other), 8 << 20)
            await store.write_content(image_archives.digest(b""), 0, lambda: pieces(b""), {})
            assert await store.read_content(image_archives.digest(b""), 8 << 20) == b""


async def test_images_and_snapshots(boxed: Boxed) -> None:
    layer = image_archives.tar({"greeting": b"hello"})
    digest = image_archives.digest(layer)
    blob = imagestore.Descriptor("application/vnd.oci.image.layer.v1.tar", digest, len(layer))
    async with channels.connect(boxed.address) as channel:
        async with imagestore.ImageStore(channel, boxed.address).leased() as store:
            assert await store.version()
            assert await store.snapshot("native", digest) is None
            await store.write_content(digest, len(layer), lambda: pieces(layer), {})
            mounts = await store.prepare_snapshot("native", "key", "", {"containerd.io/gc.root": "now"})
            assert await store.snapshot_mounts("native", "key") == mounts
            assert await store.apply(blob, mounts) == digest
            assert (Path(mounts[0].source) / "greeting").read_bytes() == b"hello"
            with pytest.raises(errors.AlreadyExistsError):
                await store.prepare_snapshot("native", "key", "", {})
            await store.commit_snapshot("native", digest, "key", {"containerd.io/snapshot/a.b": "1"})
            await store.label_snapshot("native", digest, {"containerd.io/snapshot/c.d": "2"})
            info = await store.snapshot("native", digest)
            assert info is not None
            assert {"containerd.io/snapshot/a.b": "1", "containerd.io/snapshot/c.d": "2"}.items() <= info.labels.items()
            for _ in range(2):
                await store.remove_snapshot("native", digest)
            assert await store.snapshot("native", digest) is None

            assert await store.image("localhost/a:1") is None
            for size in (1, len(layer)):
                await store.put_image("localhost/a:1", dataclasses.replace(blob, size=size), {"size": str(size)})
                image = await store.image("localhost/a:1")
                assert image is not None
                assert (image.target.digest, image.target.size, image.labels["size"]) == (digest, size, str(size))
            assert await store.container("nobody") is None
            with pytest.raises(errors.NotFoundError):
                await store.wait_task("nobody")
            assert len(await leases(channel)) == 1
        assert await leases(channel) == []
        with pytest.raises(errors.UsageError, match="mine"):
            async with store.leased():
                raise errors.UsageError("mine")
        assert await leases(channel) == []


async def leases(channel: channels.Channel) -> list[str]:
    """The leases of a containerd; a clock that jumps ends none."""
    stub = containerd_leases_grpc.LeasesStub(channel)
    metadata = {"containerd-namespace": "k8s.io"}
    found = (await stub.List(containerd_leases_pb2.ListRequest(), metadata=metadata)).leases
    assert not any("containerd.io/gc.expire" in lease.labels for lease in found)
    return [lease.id for lease in found]


async def test_that_containerd_died_does_not_hide_why_loading_failed(boxed: Boxed) -> None:
    async def load(store: imagestore.ImageStore) -> None:
        async with store.leased():
            assert await boxed.child.stop(20) == 0
            raise errors.UsageError("mine")

    async with channels.connect(boxed.address) as channel:
        with pytest.raises(errors.UsageError, match="mine"):
            await load(imagestore.ImageStore(channel, boxed.address))


async def test_a_containerd_is_asked_about_itself_once(tmp_path: Path) -> None:
    """Until the file that is its program is another one."""
    program, asked = tmp_path / "containerd", tmp_path / "asked"
    layout = node_config.Layout(str(tmp_path / "data"), str(tmp_path / "state"))
    Path(layout.state_dir).mkdir()
    settings = node_config.Settings(containerd=str(program), pause_image="localhost/pause:1")

    def install(version: str) -> None:
        real = parts.containerd(version)
        (tmp_path / "containerd-shim-runc-v2").unlink(missing_ok=True)
        (tmp_path / "containerd-shim-runc-v2").symlink_to(real.parent / "containerd-shim-runc-v2")
        script = tmp_path / "new"
        script.write_text(f'#!/bin/sh\necho "$@" >>{asked}\nexec {real} "$@"\n')
        script.chmod(0o755)
        script.rename(program)

    async def find() -> containerd_child.Programs:
        found = await containerd_child.find_programs(settings, layout)
        assert found is not None
        containerd_child.remember(found, layout)
        return found

    def questions() -> list[str]:
        return sorted(asked.read_text().splitlines())

    first = None
    for number, version in enumerate((parts.CONTAINERDS[0], parts.CONTAINERDS[-1]), start=1):
        install(version)
        first = await find()
        assert first.containerd.version == version
        assert await find() == first
        assert questions() == ["--version"] * number + ["config default"] * number
    # What is no answer is none.
    Path(layout.containerd_answers).write_text('{"program": 1}')
    assert await find() == first
    assert questions() == ["--version"] * 3 + ["config default"] * 3
    assert os.stat(layout.containerd_answers).st_mode & 0o777 == 0o600
