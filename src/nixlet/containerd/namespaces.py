"""containerd's namespaces. It imports nothing: the command line asks for them before all that talks with containerd."""

#: That of everything that Kubernetes' runtime interface sees.
CRI = "k8s.io"
