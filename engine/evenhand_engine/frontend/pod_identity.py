"""Which pod this process runs in, and the token that proves it: a projected ServiceAccount token for the operator alone."""

from pathlib import Path

import jwt

_MAX_TOKEN_BYTES = 16 * 2**10


class PodIdentity:
    """The token's file; the kubelet replaces it from time to time, so it is read each time. None: it is not known."""

    def __init__(self, token_file: Path | None) -> None:
        self._file = token_file
        self._uid = ""

    def token(self) -> str:
        """The token; empty where there is none."""
        if self._file is None:
            return ""
        try:
            with self._file.open("rb") as file:
                return file.read(_MAX_TOKEN_BYTES).decode("ascii", "replace").strip()
        except OSError:
            return ""

    @property
    def uid(self) -> str:
        """Of the pod, as its own token has it; empty where it is not known."""
        if not self._uid and (token := self.token()):
            try:
                claims = jwt.decode(token, options={"verify_signature": False})
                self._uid = str(claims["kubernetes.io"]["pod"]["uid"])
            except (jwt.PyJWTError, KeyError, TypeError):
                return ""
        return self._uid
