"""What a server gives its cluster beside its programs: the manifests in its directory, among them the cluster's DNS and classes of runtimes."""

import os

from nixlet import errors
from nixlet.cluster import coredns, runtimeclasses
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import process
from nixlet.node.cluster.preflight import finding
from nixlet.node.images import coredns as coredns_images
from nixlet.node.manifests import deployer as deployers
from nixlet.node.manifests import directory as manifest_files
from nixlet.node.manifests import kubectl
from nixlet.node.settings import config as node_config
from nixlet.pods import resolvconf

#: The manifest of the cluster's DNS.
_DNS = f"{coredns.NAME}.yaml"

#: The manifest of the runtimes' classes.
_RUNTIMES = f"{runtimeclasses.NAME}.yaml"

_WITHOUT = "--disable coredns does without"


def directory(layout: Layout) -> str:
    """Where manifests are."""
    return os.path.join(layout.server, "manifests")


def written(layout: Layout) -> list[str]:
    """The manifests there that a node wrote."""
    paths = [os.path.join(directory(layout), name) for name in (_DNS, _RUNTIMES)]
    return [path for path in paths if deployers.is_ours(path)]


def cache(layout: Layout) -> str:
    """The directory of what kubectl remembers."""
    return os.path.join(layout.state_dir, "kubectl")


def deployer(
    settings: node_config.Settings,
    cluster: ClusterSettings,
    maker: coredns_images.Maker | None,
) -> deployers.Deployer:
    """What applies the manifests.

    Args:
        settings: The node's.
        cluster: The cluster.
        maker: Makes an image of the machine's CoreDNS; None: the node's snapshotter shows no store paths.
    """

    async def dns() -> str:
        return await dns_manifest(settings, cluster, maker)

    async def classes() -> str:
        return runtimeclasses.manifest()

    layout = cluster.layout
    through = kubectl.Kubectl(
        # Who looks for it in vain is told its name.
        _program("kubectl", settings) or "kubectl",
        layout.cred("admin.kubeconfig"),
        cache(layout),
        os.environ.get("PATH", os.defpath),
    )
    packaged = {_DNS: dns, _RUNTIMES: classes}
    return deployers.Deployer(directory(layout), through, disabled=_disabled(settings), packaged=packaged)


def has_dns(settings: node_config.Settings) -> bool:
    """Whether the cluster's DNS is the server's affair."""
    return not manifest_files.is_disabled(_DNS, _disabled(settings))


def _disabled(settings: node_config.Settings) -> set[str]:
    return {part.strip() for text in settings.disable for part in text.split(",") if part.strip()}


async def dns_manifest(
    settings: node_config.Settings,
    cluster: ClusterSettings,
    maker: coredns_images.Maker | None,
) -> str:
    """The manifest of the cluster's DNS.

    Raises:
        NixletError: There is nothing that it could be, or it can't be made.
    """
    if not cluster.dns_addresses:
        raise errors.FailedPreconditionError(
            "the cluster has no DNS: --service-cidr has no tenth address", hint=f"name one: --cluster-dns; {_WITHOUT}"
        )
    file = resolvconf.for_pods(settings.resolv_conf, settings.layout.resolv_conf) or resolvconf.HOST
    image = await _image(settings, cluster, maker)
    return coredns.manifest(cluster, image, forwards=bool(resolvconf.read(file).servers))


async def _image(
    settings: node_config.Settings, cluster: ClusterSettings, maker: coredns_images.Maker | None
) -> coredns.Image:
    if settings.coredns_image:
        return coredns.Image(settings.coredns_image)
    program = _program(coredns_images.PROGRAM, settings)
    why = (
        f"there is no program {coredns_images.PROGRAM} on this machine"
        if program is None
        else f"of {program} an image can be made for the snapshotter nix only"
        if maker is None
        else "this server runs no pods, which alone has the image of its program"
        if settings.disable_agent
        else ""
    )
    if program is None or maker is None or why:
        raise errors.FailedPreconditionError(
            f"the cluster has no DNS: no image of CoreDNS is named, and {why}",
            hint=f"name an image: --coredns-image; or install CoreDNS's program; {_WITHOUT}",
        )
    return coredns.Image(await maker.image_of(program), cluster.node_name)


def _program(name: str, settings: node_config.Settings) -> str | None:
    """A program where Kubernetes' are, or on PATH: it is often packaged apart from the others."""
    return finding.program(name, settings) or process.find_program(name)
