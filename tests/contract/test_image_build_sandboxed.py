"""Images as users of Nix build them: in Nix's sandbox, as a build user, where nothing but the store is to be seen."""

import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet.images import archive, platforms
from nixlet.store import closures
from support import readme
from support.nixstore import PrivateStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
GROUP = 39_000


class SandboxedStore(PrivateStore):
    """A store with the settings of an ordinary installation, and build users that nobody else sees."""

    def __init__(self, directory: Path) -> None:
        settings = {"build-users-group": "nixlet-test", "sandbox": "true", "sandbox-fallback": "false"}
        super().__init__(directory, **settings)
        users = [f"nixlet-test{number}" for number in (1, 2)]
        lines = [f"{name}:x:{GROUP + place}:{GROUP}::/:/bin/false\n" for place, name in enumerate(users, start=1)]
        self._accounts = {
            "/etc/passwd": Path("/etc/passwd").read_text() + "".join(lines),
            "/etc/group": Path("/etc/group").read_text() + f"nixlet-test:x:{GROUP}:{','.join(users)}\n",
        }
        for path, text in self._accounts.items():
            (directory / Path(path).name).write_text(text)
        os.mkdir(self.store_dir)
        os.chown(self.store_dir, 0, GROUP)
        os.chmod(self.store_dir, 0o1775)

    def nix(self, *argv: str) -> str:
        mounting = "".join(f'mount --bind "$0/{Path(path).name}" {path} && ' for path in self._accounts)
        return super().nix("unshare", "-m", "sh", "-c", f'{mounting} exec "$@"', str(self.directory), *argv)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SandboxedStore]:
    private = SandboxedStore(tmp_path / "nix")
    yield private
    private.remove()


#: Of nixpkgs, what the README's example and nixlet's own files ask for.
NIXPKGS = """
{ }:
let
  host = import @root@/nix/from-host.nix { };
  pkgs = {
    inherit (host) busybox;
    inherit pkgs;
    stdenv.hostPlatform.system = builtins.currentSystem;
    callPackage = file: arguments:
      let function = import file;
      in function (builtins.intersectAttrs (builtins.functionArgs function) pkgs // arguments);
    python3Packages = builtins.listToAttrs (map (name: { inherit name; value = name; }) [ "hatchling" @names@ ]) // {
      buildPythonApplication = arguments: host.nixlet // { inherit arguments; };
    };
    hello = derivation {
      name = "hello";
      system = builtins.currentSystem;
      builder = "${host.busybox}/bin/busybox";
      # That it is a sandbox, and a build user.
      args = [ "sh" "-euc" ''
        PATH=${host.busybox}/bin
        ! busybox test -e /usr
        busybox test "$(busybox stat -c %u .)" -ne 0
        busybox mkdir -p $out/bin
        echo "#!${host.busybox}/bin/busybox sh" >$out/bin/hello
        busybox chmod 755 $out/bin/hello
      '' ];
    };
  };
in
pkgs
"""


def requirements() -> list[str]:
    """What nixlet's metadata says that it needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [re.split(r"[^a-z0-9-]", each)[0] for each in project["dependencies"]]


def nixpkgs(directory: Path) -> str:
    names = " ".join(f'"{name}"' for name in requirements())
    (directory / "nixpkgs").mkdir()
    (directory / "nixpkgs/default.nix").write_text(NIXPKGS.replace("@root@", str(ROOT)).replace("@names@", names))
    return f"nixpkgs={directory}/nixpkgs"


@pytest.mark.parametrize(("example", "names"), [("with nixpkgs", {"hello", "busybox"}), ("without", {"busybox"})])
def test_the_readmes_examples(store: SandboxedStore, tmp_path: Path, example: str, names: set[str]) -> None:
    """As they stand, in a directory with nixlet's `nix` beside them."""
    file = str(readme.checkout(tmp_path / "checkout", readme.image_expressions()[example]))
    search = ["-I", nixpkgs(tmp_path)] if example == "with nixpkgs" else []
    out = store.nix("nix-build", file, "--no-out-link", *search)
    with archive.open_archive(out) as source:
        image = source.image(platforms.host_platform())
    assert image.names == (f"nix:0{out}:latest",)
    named = closures.parse_annotations(image.layers[0].descriptor.annotations or {}, store.store_dir)
    assert named is not None
    listed = map(os.path.basename, Path(f"{named.closure_info}/store-paths").read_text().split())
    assert {name for name in (each.partition("-")[2] for each in listed) if not name.startswith("config-")} == names
    # Built again, it has the same bytes.
    assert store.nix("nix-build", file, "--no-out-link", "--check", *search) == out


#: Imports all of nixlet's modules but the one that runs it; prints how many, and how many modules had to be compiled for that.
#: Without quotes, as it is put between some.
IMPORT_ALL = """import os, pkgutil, importlib, nixlet; print(len([importlib.import_module(m.name) for m in
pkgutil.walk_packages(nixlet.__path__, nixlet.__name__ + chr(46)) if not m.name.endswith(chr(95) * 2)]),
len([m for m in sys.modules.values() if isinstance(m, type(sys)) and m.__spec__ and m.__spec__.cached
and not os.path.exists(m.__spec__.cached)]))"""

ALL = """
let
  host = import @root@/nix/from-host.nix { };
in
derivation {
  name = "all";
  system = builtins.currentSystem;
  builder = "${host.busybox}/bin/busybox";
  args = [ "sh" "-euc" ''
    ${host.busybox}/bin/busybox sed 's/from nixlet.__main__ .*main())/@all@/' ${host.nixlet}/bin/nixlet >run
    ${host.busybox}/bin/busybox sh run >$out
  '' ];
}
"""


def test_nixlet_from_the_host_is_whole(store: SandboxedStore, tmp_path: Path) -> None:
    """Every module can be imported where only the store is, and is compiled."""
    text = ALL.replace("@root@", str(ROOT)).replace("@all@", IMPORT_ALL.replace("\n", " "))
    (tmp_path / "all.nix").write_text(text)
    out = store.nix("nix-build", f"{tmp_path}/all.nix", "--no-out-link")
    modules = [path for path in (ROOT / "src/nixlet").rglob("*.py") if path.name != "__main__.py"]
    assert Path(out).read_text() == f"{len(modules) - 1} 0\n"


def test_the_package(store: SandboxedStore, tmp_path: Path) -> None:
    """What nixpkgs' builder would be given."""
    package = f"(import <nixpkgs> {{ }}).callPackage {ROOT}/nix/package.nix {{ }}"
    expression = f"let given = ({package}).arguments; in given // {{ src = builtins.readDir given.src; }}"
    argv = ["nix-instantiate", "--eval", "--read-write-mode", "--strict", "--json", "-I", nixpkgs(tmp_path)]
    given = json.loads(store.nix(*argv, "-E", expression))
    assert given["dependencies"] == requirements()
    assert (given["pname"], given["build-system"]) == ("nixlet", ["hatchling"])
    assert given["src"] == {
        "LICENSE": "regular",
        "README.md": "regular",
        "pyproject.toml": "regular",
        "src": "directory",
    }


#: What a kubelet takes for a repository's name (distribution project, reference grammar).
REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")


def evaluate(expression: str) -> "subprocess.CompletedProcess[str]":
    call = 'import @root@/nix/build-image.nix { nixlet = "/nixlet"; shell = "/sh"; }'.replace("@root@", str(ROOT))
    argv = ["nix-instantiate", "--eval", "--readonly-mode", "-E", f"(({call}) {{ {expression} }}).image"]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("hello", "hello"),
        ("a_b.c--d", "a_b.c--d"),
        ("Foo", "foo"),
        ("gtk+", "gtk"),
        ("team/Gtk+3.0_-x", "gtk-3-0-x"),
        ("_x", "x"),
        ("x" * 192, "x" * 192),
    ],
)
def test_every_name_makes_a_reference_that_kubelets_take(name: str, kept: str) -> None:
    done = evaluate(f'name = "{name}"; resolvedByNix = true;')
    assert done.returncode == 0, done.stderr
    reference = done.stdout.strip().strip('"')
    assert reference.endswith(f"-nix-image-{kept}.tar")
    domain, _, repository = reference.partition("/")
    assert domain == "nix:0"
    assert REPOSITORY.fullmatch(repository)
    assert len(reference) <= 255


@pytest.mark.parametrize(("name", "why"), [("+", "neither letters nor digits"), ("x" * 193, "at most 255 characters")])
def test_names_that_make_no_reference(name: str, why: str) -> None:
    done = evaluate(f'name = "{name}"; resolvedByNix = true;')
    assert (done.returncode, why in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("localhost:5000/foo:1", 'has a tag; write: name = "localhost:5000/foo"; tag = "1";'),
        ("team/foo bar", "can't be a store path's: it needs 1 to 193 letters"),
        (f"foo@sha256:{'0' * 64}", "buildImage: the name"),
        ("", "can't be a store path's"),
        ("x" * 194, "can't be a store path's"),
    ],
)
def test_names_that_no_store_path_can_have_are_told_in_words(name: str, why: str) -> None:
    done = evaluate(f'name = "{name}";')
    assert (done.returncode, why in done.stderr) == (1, True), done.stderr
    for taken in ("x" * 193, "localhost:5000/foo"):
        assert evaluate(f'name = "{taken}";').returncode == 0
