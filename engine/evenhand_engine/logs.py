"""Logs: one line a record, `time level logger message key=value ...`, on stderr."""

import json
import logging
import re
import sys
from typing import Any

_PLAIN = re.compile(r"[\w.:/+@%-]+")


class LineFormatter(logging.Formatter):
    """Writes `record.fields` as key=value after the message; a value that is not plain is quoted as JSON.

    A tracebacks's line feeds are escaped too, so that nothing a client sends can begin a line.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        message = record.getMessage()
        head = f"{self.formatTime(record)} {record.levelname} {record.name} {message if message.isprintable() else json.dumps(message)}"
        return head + "".join(f" {key}={_quote(value)}" for key, value in fields.items() if value not in ("", None))


def _quote(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def configure_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
