"""Exceptions of the engine.

EvenhandError
 ├─ StartupError        the engine cannot start: bad flag, missing model, port in use (exit code 1)
 ├─ EngineDeadError     the engine core process is gone; no request can be served
 └─ Refusal             one request is refused, with an HTTP status and a machine-readable code
"""

from collections.abc import Mapping


class EvenhandError(Exception):
    """Base of all errors that this package raises on purpose."""


class StartupError(EvenhandError):
    """The engine cannot start. The message says what is wrong, where, and what to do; it is all the user sees."""


class EngineDeadError(EvenhandError):
    """The engine core process ended while requests were in flight."""


class Refusal(EvenhandError):
    """One request is refused at the door or in the queue.

    Attributes:
        status: HTTP status code.
        code: machine-readable reason, sent as `error.code` and `X-Evenhand-Reason`.
        param: name of the offending request field, if one is to blame.
        retry_after: seconds until a retry can succeed; None where a retry cannot help.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def renamed(self, params: Mapping[str, str]) -> "Refusal":
        """The same for a body that was translated: `params` are its own fields, by those that they became."""
        param = params.get(self.param or "", self.param)
        message = self.message.replace(f"`{self.param}", f"`{param}")
        return Refusal(self.status, self.code, message, param=param, retry_after=self.retry_after)
