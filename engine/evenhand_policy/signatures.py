"""Ed25519 keys and signatures: the operator's, of which pods hold the public half only, and each engine process's own.

Public keys travel as an RFC 7517 key set. A signature covers texts without line feeds, by purpose: one that was made for
something else is never mistaken for it.
"""

import binascii
import functools
from collections.abc import Iterable

import jwt
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from jwt.algorithms import OKPAlgorithm

MAX_KEYS = 8

PublicKeys = tuple[Ed25519PublicKey, ...]
"""Whose signatures are believed; empty: nobody's."""


class _KeySet(msgspec.Struct):
    keys: list[dict[str, str]]


def write_key_set(keys: Iterable[Ed25519PublicKey]) -> bytes:
    """The key set as JSON, in order, each key once."""
    found = [OKPAlgorithm.to_jwk(key, as_dict=True) for key in keys]
    return msgspec.json.encode(
        {"keys": [key for place, key in enumerate(found) if key not in found[:place]]}, order="sorted"
    )


@functools.lru_cache(maxsize=8)
def read_key_set(text: bytes) -> PublicKeys:
    """The Ed25519 keys of a key set, at most 8; none where it cannot be read."""
    try:
        rows = msgspec.json.decode(text, type=_KeySet).keys[:MAX_KEYS]
        keys = [OKPAlgorithm.from_jwk(row) for row in rows]
    except (msgspec.DecodeError, jwt.PyJWTError):
        return ()
    return tuple(key for key in keys if isinstance(key, Ed25519PublicKey))


def public_text(key: Ed25519PrivateKey) -> str:
    """The public half in hexadecimal, 64 characters."""
    return key.public_key().public_bytes_raw().hex()


def sign(key: Ed25519PrivateKey, purpose: str, *parts: str) -> str:
    """The signature in hexadecimal."""
    return key.sign(_message(purpose, parts)).hex()


def is_signed(key: Ed25519PublicKey, signature: str, purpose: str, *parts: str) -> bool:
    """Whether the holder of the private half made the signature."""
    try:
        key.verify(binascii.unhexlify(signature), _message(purpose, parts))
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


def is_signed_by_text(public: str, signature: str, purpose: str, *parts: str) -> bool:
    """The same for a public half as `public_text` writes it."""
    try:
        key = Ed25519PublicKey.from_public_bytes(binascii.unhexlify(public))
    except (binascii.Error, ValueError):
        return False
    return is_signed(key, signature, purpose, *parts)


def _message(purpose: str, parts: Iterable[str]) -> bytes:
    return "\n".join(("evenhand-v2", purpose, *parts)).encode("utf-8", "surrogatepass")
