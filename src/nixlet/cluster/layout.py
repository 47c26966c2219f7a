"""Where a cluster's files are in a node's directories: k3s's names, so that who knows one finds their way in the other."""

import dataclasses
import os


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """The places in a node's data and state directories."""

    data_dir: str
    state_dir: str

    @property
    def server(self) -> str:
        """What servers have."""
        return os.path.join(self.data_dir, "server")

    @property
    def agent(self) -> str:
        """All that this node keeps."""
        return os.path.join(self.data_dir, "agent")

    def tls(self, name: str) -> str:
        """A certificate's file, or a key's; with an empty name their directory."""
        return os.path.join(self.server, "tls", name).rstrip("/")

    def cred(self, name: str) -> str:
        """A file by which one gets in: kubeconfig files, the key of secrets; with an empty name their directory."""
        return os.path.join(self.server, "cred", name).rstrip("/")

    def node(self, name: str) -> str:
        """A file of the node's own: its certificates, its kubeconfig files."""
        return os.path.join(self.agent, name)

    @property
    def database(self) -> str:
        """The directory of the datastore: kine's file, or etcd's directory below it."""
        return os.path.join(self.server, "db")

    @property
    def kine_socket(self) -> str:
        """Where kine answers, in a directory of its own: who reaches the socket reads and writes the whole cluster."""
        return os.path.join(self.state_dir, "kine", "kine.sock")
