"""What becomes of a request that is no HTTP: an error object, and in the log the kind of its fault and nothing of what it holds."""

import logging

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from evenhand_engine.errors import Refusal
from evenhand_engine.openai.errors import error_response

_LOGGER = logging.getLogger("aiohttp.server")


class Protocol(web.RequestHandler):
    """aiohttp's end of a connection. What it has to answer without an application, it answers as that would."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Ends the connection. Raises ConnectionError where an answer has begun."""
        super().handle_error(request, status, exc, message)
        if status < 500:
            refusal = Refusal(status, "invalid_http", "The request is not valid HTTP.")
        else:
            refusal = Refusal(status, "internal_error", "The server failed to answer.", retry_after=1)
        response = error_response(refusal)
        response.headers["Server"] = "evenhand"
        response.force_close()
        return response


def keep_out_of_logs() -> None:
    """Must be called before a port is served. aiohttp's own record quotes the line, which may hold a credential."""
    _LOGGER.addFilter(_strip)


def _strip(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.levelno, record.levelname = logging.INFO, "INFO"  # anybody can cause it
        record.exc_info = None
        record.fields = {"error": type(error).__name__}
    return _LOGGER.isEnabledFor(record.levelno)
