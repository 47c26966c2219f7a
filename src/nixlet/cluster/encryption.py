"""How secrets are encrypted in the datastore: the API server's configuration of that, and the key in it, as k3s makes them."""

import binascii
import hashlib
import json
import os
import secrets

from nixlet import errors
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import files

#: The key's size (bytes): AES-256.
_KEY_SIZE = 32

#: The names of the configuration and of what says that it is in use, in ``server/cred``.
FILES = ("encryption-config.json", "encryption-state.json")


def configuration(key: bytes) -> str:
    """The API server's configuration: secrets are written with the key, and such as are not encrypted yet can be read. A secret."""
    written = {"name": "aescbckey", "secret": binascii.b2a_base64(key, newline=False).decode()}
    return json.dumps(
        {
            "kind": "EncryptionConfiguration",
            "apiVersion": "apiserver.config.k8s.io/v1",
            "resources": [{"resources": ["secrets"], "providers": [{"aescbc": {"keys": [written]}}, {"identity": {}}]}],
        }
    )


def ensure(settings: ClusterSettings) -> None:
    """Have the configuration in ``server/cred`` (mode 0600) where secrets are to be encrypted. One that is there is kept as it is.

    Raises:
        FailedPreconditionError: What is there can't be read, or is missing although secrets were encrypted; or they were, and are not to be:
            nobody could read them.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    path, state = (settings.layout.cred(name) for name in FILES)
    # The state is written last: where it is there the configuration was.
    there, begun = os.path.lexists(path), os.path.lexists(state)
    if not settings.secrets_encryption:
        if there or begun:
            raise errors.FailedPreconditionError(
                "secrets of this cluster are encrypted, and nobody could read them without", hint="--secrets-encryption"
            )
        return
    if begun and not there:
        raise errors.FailedPreconditionError(
            f"{path} is missing, and secrets of this cluster were encrypted with its key",
            hint="bring it back from a backup: without its key secrets are lost",
        )
    if there:
        with files.refusing(f"{path} can't be read"), open(path, "rb") as file:
            text = file.read()
        _check(path, text)
    else:
        text = configuration(secrets.token_bytes(_KEY_SIZE)).encode()
        files.write_atomically(path, text, mode=0o600)
    if not begun:
        # What k3s knows the stage of a change of keys by: the first, with the configuration's sum.
        files.write_atomically(state, f"start-{hashlib.sha256(text).hexdigest()}", mode=0o600)


def _check(path: str, text: bytes) -> None:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("kind") != "EncryptionConfiguration" or not found.get("resources"):
        # (without the cause, which would hold the text)
        raise errors.FailedPreconditionError(
            f"{path} holds no configuration of encryption",
            hint="bring it back from a backup: without its key secrets are lost",
        )
