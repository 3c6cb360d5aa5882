"""Certificates and kubeconfigs of a test cluster."""

import base64
import json
from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa


class CertificateAuthority:
    """The cluster's own authority, made anew for each run; writes what it issues below `directory`, which it makes."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self._authority = trustme.CA()
        self._directory = directory
        self.certificate = directory / "ca.crt"
        self._authority.cert_pem.write_to_path(self.certificate)

    def issue(self, name: str, *identities: str, organization: str | None = None) -> tuple[Path, Path]:
        """Certificate and private key; to Kubernetes `name` is a user and `organization` the user's group."""
        stem = name.replace(":", "-")
        # trustme marks the alternative names critical, and Go refuses a critical extension that is empty
        leaf = self._authority.issue_cert(*identities or (stem,), common_name=name, organization_name=organization)
        certificate, key = self._directory / f"{stem}.crt", self._directory / f"{stem}.key"
        leaf.cert_chain_pems[0].write_to_path(certificate)
        leaf.private_key_pem.write_to_path(key)
        return certificate, key


def write_signing_key(path: Path, trusted: Path) -> None:
    """A new RSA key that signs ServiceAccount tokens; it is added to the file of those that are trusted."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    encoding, encryption = serialization.Encoding.PEM, serialization.NoEncryption()
    text = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, encryption)
    path.write_bytes(text)
    with trusted.open("ab") as file:
        file.write(text)


def write_kubeconfig(
    path: Path, server: str, authority: Path, user: dict[str, str], namespace: str = "default"
) -> Path:
    """A kubeconfig of one user, with everything inline. `user` is as in kubeconfig: a token, or client certificate data."""
    cluster = {"server": server, "certificate-authority-data": encoded(authority)}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
        "current-context": "test",
    }
    path.write_text(json.dumps(document))  # JSON is YAML
    return path


def client_certificate(certificate: Path, key: Path) -> dict[str, str]:
    """The user of a kubeconfig who authenticates by certificate."""
    return {"client-certificate-data": encoded(certificate), "client-key-data": encoded(key)}


def encoded(path: Path) -> str:
    """Contents in base64, as kubeconfig wants them."""
    return base64.b64encode(path.read_bytes()).decode()
