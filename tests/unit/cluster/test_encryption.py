"""How secrets are encrypted in the datastore."""

import base64
import hashlib
import json
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.cluster import certificates, encryption
from nixlet.cluster.settings import ClusterSettings
from support import clusters


@pytest.fixture
def settings(tmp_path: Path) -> ClusterSettings:
    found = clusters.settings(tmp_path, secrets_encryption=True)
    certificates.ensure(found, clusters.NOW)
    return found


def test_secrets_are_written_with_a_key_and_read_without(settings: ClusterSettings) -> None:
    encryption.ensure(settings)
    path, state = (Path(settings.layout.cred(f"encryption-{name}.json")) for name in ("config", "state"))
    text = path.read_bytes()
    found = json.loads(text)
    key = found["resources"][0]["providers"][0]["aescbc"]["keys"][0]
    assert len(base64.b64decode(key.pop("secret"), validate=True)) == 32
    assert found == {
        "kind": "EncryptionConfiguration",
        "apiVersion": "apiserver.config.k8s.io/v1",
        "resources": [
            {"resources": ["secrets"], "providers": [{"aescbc": {"keys": [{"name": "aescbckey"}]}}, {"identity": {}}]}
        ],
    }
    assert state.read_text() == f"start-{hashlib.sha256(text).hexdigest()}"
    assert {each.stat().st_mode & 0o777 for each in (path, state)} == {0o600}
    before = clusters.content(Path(settings.data_dir))
    encryption.ensure(settings)
    assert clusters.content(Path(settings.data_dir)) == before


def test_each_cluster_has_a_key_of_its_own() -> None:
    assert encryption.configuration(b"1" * 32) != encryption.configuration(b"2" * 32)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"kind": "EncryptionConfiguration"}', '{"kind": "Pod", "resources": [1]}']
)
def test_a_damaged_configuration_is_told_and_kept(settings: ClusterSettings, text: str) -> None:
    path = Path(settings.layout.cred("encryption-config.json"))
    path.write_text(text)
    with pytest.raises(
        errors.FailedPreconditionError, match=r"encryption-config\.json holds no configuration of encryption$"
    ):
        encryption.ensure(settings)
    assert path.read_text() == text


def test_what_is_encrypted_stays_so(settings: ClusterSettings, tmp_path: Path) -> None:
    without = clusters.settings(tmp_path)
    encryption.ensure(without)
    assert list(Path(settings.layout.cred("")).iterdir()) == []
    encryption.ensure(settings)
    with pytest.raises(errors.FailedPreconditionError, match=r"^secrets of this cluster are encrypted") as caught:
        encryption.ensure(without)
    assert caught.value.hint == "--secrets-encryption"


def test_a_key_that_is_lost_is_not_replaced_by_another_one(settings: ClusterSettings, tmp_path: Path) -> None:
    encryption.ensure(settings)
    path = Path(settings.layout.cred("encryption-config.json"))
    path.unlink()
    with pytest.raises(errors.FailedPreconditionError, match=r"encryption-config\.json is missing"):
        encryption.ensure(settings)
    with pytest.raises(errors.FailedPreconditionError, match=r"^secrets of this cluster are encrypted"):
        encryption.ensure(clusters.settings(tmp_path))
    assert not path.exists()
