"""Kubernetes' own conformance tests of a node, on Nix images: how many there are, and how many pass."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
from nixlet.images import builder, model, reference
from nixlet.store import paths
from support import image_archives, kubernetes, nixstore, parts, storeimages

ROOT = Path(__file__).parents[1]

#: The tests that a node has to pass, without those that their authors know to fail now and then.
FOCUS, SKIP = r"\[NodeConformance\]", r"\[Flaky\]"

#: The machine's programs that the tests call in their containers, beside busybox's.
DYNAMIC = {"bash": "/usr/bin/bash", "curl": "/usr/bin/curl", "ip": "/sbin/ip", "nc": "/usr/bin/nc.openbsd"}

#: Tests that run beside each other.
BESIDE = 8

#: In the test's image of that name, with the groups that one of the tests looks for.
PASSWD = "root:x:0:0:root:/root:/bin/sh\nuser-defined-in-image:x:1000:1000::/home:/bin/sh\n"
GROUP = "root:x:0:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n"

PATH = ["PATH=/bin"]

#: How an image of the suite runs, by its name.
CONFIGS = {
    "agnhost": model.ContainerConfig(env=PATH, entrypoint=["/agnhost"], cmd=["pause"]),
    "busybox": model.ContainerConfig(env=PATH, cmd=["sh"]),
    "glibc-dns-testing": model.ContainerConfig(env=PATH, cmd=["sh"]),
    "nginx": model.ContainerConfig(env=PATH, entrypoint=["/agnhost"], cmd=["test-webserver"]),
    "nonroot": model.ContainerConfig(env=PATH, user="1234", cmd=["sh"]),
    "pause": model.ContainerConfig(env=PATH, entrypoint=["/agnhost"], cmd=["pause"]),
}


def suite() -> Path:
    """The directory of the suite's programs; they are built when somebody asks for them."""
    listed = subprocess.run(
        [ROOT / "scripts" / "parts", "kubernetes-conformance"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return Path(listed.split()[1])


def root(programs: Path, scratch: Path) -> tuple[paths.StorePath, list[paths.StorePath]]:
    """The files that the suite's images have, and the store paths that these need."""
    adding = nixstore.Import()
    applets = subprocess.run([storeimages.BUSYBOX, "--list"], stdout=subprocess.PIPE, text=True, check=True).stdout
    inside = {name: nixstore.nar_link("busybox") for name in applets.split()}
    inside["busybox"] = nixstore.nar_file(storeimages.BUSYBOX.read_bytes(), executable=True)
    needed = []
    for name, program in DYNAMIC.items():
        package, content = with_libraries(adding, program, scratch)
        needed.append(package)
        inside[name] = nixstore.nar_file(content, executable=True)
    # busybox's own drops variables whose names are no identifiers, which ConfigMaps may have.
    inside["sh"] = nixstore.nar_link("bash")
    agnhost = nixstore.nar_file((programs / "agnhost").read_bytes(), executable=True)
    empty = nixstore.nar_directory({})
    tree = {
        "agnhost": agnhost,
        "agnhost-2": nixstore.nar_link("agnhost"),
        "bin": nixstore.nar_directory(inside),
        **{name: nixstore.nar_file(content) for name, content in certificate(scratch).items()},
        "etc": nixstore.nar_directory(
            {"passwd": nixstore.nar_file(PASSWD.encode()), "group": nixstore.nar_file(GROUP.encode())}
        ),
        **dict.fromkeys(("home", "root", "tmp", "uploads"), empty),
        "usr": nixstore.nar_directory({"bin": nixstore.nar_link("../bin"), "sbin": nixstore.nar_link("../bin")}),
    }
    made = adding.add("conformance", nixstore.nar_directory(tree), needed)
    adding.run(os.environ)
    return made, needed


def certificate(scratch: Path) -> dict[str, bytes]:
    """What the suite's program shows as an HTTPS server, by the files' names: nobody checks who signed it."""
    made = {"localhost.crt": scratch / "localhost.crt", "localhost.key": scratch / "localhost.key"}
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    argv += ["-out", str(made["localhost.crt"]), "-keyout", str(made["localhost.key"])]
    subprocess.run(argv, check=True, capture_output=True)
    return {name: path.read_bytes() for name, path in made.items()}


def with_libraries(adding: nixstore.Import, program: str, scratch: Path) -> tuple[paths.StorePath, bytes]:
    """The libraries of a program of this machine as a store path, and the program, which finds them there."""
    needed = storeimages.libraries(program)
    name = Path(program).name
    files = {path.name: nixstore.nar_file(path.read_bytes(), executable=True) for path in needed}
    package = adding.add(f"{name}-libraries", nixstore.nar_directory(files))
    copied = scratch / name
    shutil.copyfile(program, copied)
    patch = [
        "patchelf",
        "--set-interpreter",
        f"{package}/{storeimages.loader(needed)}",
        "--force-rpath",
        "--set-rpath",
        package,
    ]
    subprocess.run([*patch, str(copied)], check=True)
    return package, copied.read_bytes()


def images(programs: Path, directory: Path) -> dict[str, Path]:
    """The archives of the images that the suite names, by their names."""
    named = subprocess.run(
        [programs / "conformance", "-images"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    top, needed = root(programs, directory)
    made = {}
    for number, name in enumerate(named):
        kind = name.rpartition("/")[2].partition(":")[0]
        archive = directory / f"{number}.tar"
        if kind == "nonewprivs":
            # A program that gets another user's rights can't be a store path: this one is an ordinary image.
            archive.write_bytes(ordinary(programs / "nonewprivs", name))
        else:
            request = builder.BuildRequest(
                CONFIGS[kind],
                (top, *needed),
                None,
                (top,),
                None,
                reference.parse(name),
                model.Platform("amd64", "linux"),
            )
            builder.build_image(request, str(archive))
        made[name] = archive
    return made


def ordinary(program: Path, name: str) -> bytes:
    """An image archive with a program that runs with its owner's rights."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as out:
        out.add(program, "nnp", filter=owned_by_root)
    files = image_archives.oci([layer.getvalue()], name=name, config={"Entrypoint": ["/nnp"]})
    return image_archives.tar(files)


def owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.mode = 0o4755
    return member


def run(programs: Path, cluster: kubernetes.Cluster, directory: Path, focus: str, beside: int) -> list[dict[str, Any]]:
    """The suite's reports of its tests, those that weren't chosen left out: those that chose not to run here have a reason."""
    # The program that runs tests beside each other knows a suite by its name.
    (directory / "node.test").symlink_to(programs / "conformance")
    report = directory / "report.json"
    argv = [str(programs / "ginkgo"), f"-procs={beside}", "-timeout=4h", f"-json-report={report}"]
    argv += [
        f"-focus={focus}",
        f"-skip={SKIP}",
        str(directory / "node.test"),
        "--",
        f"-kubeconfig={cluster.kubeconfig}",
    ]
    argv += ["-provider=skeleton", "-num-nodes=1"]
    path = f"{parts.kubernetes()}:{os.environ['PATH']}"
    subprocess.run(argv, env={**os.environ, "PATH": path}, stdout=sys.stderr, check=False)
    (suite_report,) = json.loads(report.read_text())
    chosen = [each for each in suite_report["SpecReports"] or [] if each["LeafNodeType"] == "It"]
    return [each for each in chosen if each["State"] not in {"skipped", "pending"} or "Failure" in each]


def name_of(spec: Mapping[str, Any]) -> str:
    return " ".join([*(spec["ContainerHierarchyTexts"] or []), spec["LeafNodeText"]])


def document(specs: Sequence[Mapping[str, Any]], version: str) -> str:
    """The report as a section of docs/kubelet.md."""
    machine = ", ".join(f"{key} {value}" for key, value in measure.machine().items())
    passed = [spec for spec in specs if spec["State"] == "passed"]
    others = [spec for spec in specs if spec["State"] != "passed"]
    lines = [
        f"Machine: {machine}; Kubernetes {version}, containerd {parts.CONTAINERDS[-1]}.",
        "",
        f"{len(passed)} of {len(specs)} passed.",
    ]
    if others:
        lines += ["", "| not passed | as | because |", "|---|---|---|"]
    for spec in sorted(others, key=name_of):
        reason = " ".join(spec.get("Failure", {}).get("Message", "").split())[:200].replace("|", "\\|")
        lines.append(f"| {name_of(spec)} | {spec['State']} | {reason} |")
    return "\n".join(lines)


def main() -> None:
    parser = measure.arguments(__doc__ or "")
    parser.add_argument("--focus", default=FOCUS, help="a regular expression that names of tests must fit")
    parser.add_argument("--beside", type=int, default=BESIDE, help="tests that run beside each other")
    chosen = parser.parse_args()
    programs = suite()
    with tempfile.TemporaryDirectory(prefix="nixlet-conformance-") as name:
        directory = Path(name)
        cluster = kubernetes.Cluster(
            17, directory / "cluster", "--containerd", str(parts.containerd(parts.CONTAINERDS[-1]))
        )
        (directory / "archives").mkdir()
        archives = images(programs, directory / "archives")
        with kubernetes.cleaned_up(cluster):
            cluster.start()
            cluster.await_node()
            for reference_name, archive in archives.items():
                cluster.ok("image", "load", "--ref", reference_name, str(archive))
            version = cluster.get("nodes")["items"][0]["status"]["nodeInfo"]["kubeletVersion"]
            specs = run(programs, cluster, directory, chosen.focus, chosen.beside)
    figures = [{"name": name_of(spec), "state": spec["State"]} for spec in specs]
    measure.publish(chosen, "conformance", figures, document(specs, version), "docs/kubelet.md")


if __name__ == "__main__":
    sys.exit(main())
