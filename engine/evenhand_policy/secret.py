"""Secrets, and how resources refer to them."""

import base64
import functools
from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta, field

from evenhand_policy.schema import DnsName, Metadata, Model

API_KEYS_TYPE = "evenhand.dev/api-keys"
"""Type of Secrets that hold API keys and nothing else."""


class SecretReference(Model, frozen=True, kw_only=True):
    """A Secret in the namespace of the object that names it."""

    name: Annotated[DnsName, Meta(description="Name of the Secret, in the same namespace.")]


class SecretKeys(Model, frozen=True, kw_only=True):
    """Keys that a Secret holds. Every value in it is a key, so that an old and a new one can be valid at once."""

    secret_ref: Annotated[
        SecretReference, Meta(description="The Secret. Each of its values is one key of at least 24 characters.")
    ]


class Secret(Model, frozen=True, kw_only=True, dict=True):
    """A Kubernetes Secret (core/v1), whole or as an item of a list, which has no kind. Its text never shows what it holds."""

    api_version: Literal["v1"] = "v1"
    kind: Literal["Secret"] = "Secret"
    metadata: Metadata
    type: str = "Opaque"
    data: dict[str, str] = field(default_factory=dict)
    string_data: dict[str, str] = field(default_factory=dict)
    immutable: bool = False

    def __post_init__(self) -> None:
        for key, value in self.data.items():
            try:
                _from_base64(value)
            except ValueError:
                raise ValueError(f"data.{key} is not base64; write plain text under stringData") from None

    @functools.cached_property
    def values(self) -> Mapping[str, bytes]:
        """Decoded values by key; as at the API server, `stringData` wins over `data`. Decoded once: every change of a
        policy has the keys of all others compiled again."""
        decoded = {key: _from_base64(value) for key, value in self.data.items()}
        return decoded | {key: value.encode("utf-8", "surrogatepass") for key, value in self.string_data.items()}

    def __repr__(self) -> str:
        return f"Secret({self.metadata.namespace}/{self.metadata.name})"


def _from_base64(text: str) -> bytes:
    return base64.b64decode(text.replace("\r", "").replace("\n", ""), validate=True)
