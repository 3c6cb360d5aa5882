"""API keys: what counts as one, and the hash by which everybody but the client knows it; and how accounts are named."""

import hashlib
import re

MIN_KEY_CHARACTERS = 24
MAX_KEY_CHARACTERS = 1024
MAX_KEYS_PER_SECRET = 64

_SENDABLE = re.compile(rb"[!-~]{1,%d}" % MAX_KEY_CHARACTERS)


def key_hash(key: str | bytes) -> str:
    """`sha256:` and the hexadecimal SHA-256 of a key as the client sends it, without surrounding white space."""
    raw = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
    return "sha256:" + hashlib.sha256(raw.strip()).hexdigest()


def bound_account(subject: str, uid: str) -> str:
    """A ServiceAccount as documents name it: the subject of its tokens, and its uid where one is meant. An engine that does
    not know of uids knows nobody by that name."""
    return f"{subject}#{uid}" if uid else subject


def read_account(entry: str) -> tuple[str, str]:
    """The subject of a ServiceAccount's tokens, and its uid; empty: whichever."""
    subject, _, uid = entry.partition("#")
    return subject, uid


def is_sendable(key: bytes) -> bool:
    """Whether a key can be sent as a bearer token: visible ASCII, not too long."""
    return _SENDABLE.fullmatch(key.strip()) is not None


def is_strong(key: bytes) -> bool:
    """Whether a key is long enough that nobody finds it by hashing guesses."""
    return len(key.strip()) >= MIN_KEY_CHARACTERS
