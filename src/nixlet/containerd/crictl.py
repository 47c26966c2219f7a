"""crictl's configuration (cri-tools, docs/crictl.md)."""

import json


def render(*, runtime_socket: str, image_socket: str) -> str:
    """The text of ``crictl.yaml`` for a node.

    Args:
        runtime_socket: The path of CRI's runtime service.
        image_socket: The path of CRI's image service, which has to know what the runtime's doesn't: ``nix:0`` references.
    """
    # JSON's strings are YAML's, whatever the paths hold.
    values = {
        "runtime-endpoint": json.dumps(f"unix://{runtime_socket}"),
        "image-endpoint": json.dumps(f"unix://{image_socket}"),
        # Seconds: a pull of a large closure takes its time.
        "timeout": "600",
    }
    return "".join(f"{key}: {value}\n" for key, value in values.items())
