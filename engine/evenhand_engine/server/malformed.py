"""What is logged of a request that is no HTTP: the kind of its fault, and nothing of what it holds."""

import logging

from aiohttp.http_exceptions import HttpProcessingError

_LOGGER = logging.getLogger("aiohttp.server")


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
