"""Logging of the operator process: JSON or text on stderr, times in UTC."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from sailvl_operator.api.untrusted import clean_lines

_NOISY_LOGGERS = ("kopf", "kubernetes", "aiohttp")


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON, with all fields that are bound to it (namespace, run, …)."""

    _standard_fields = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in self._standard_fields}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Formats a record as lines of text, without control characters, which a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return clean_lines(super().format(record))


def configure_logging(level: str, format_: str) -> None:
    """Configure the root logger. `level`: DEBUG, INFO, WARNING or ERROR; `format_`: json or text. Libraries log
    warnings and errors only."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonFormatter() if format_ == "json" else TextFormatter("%(asctime)s %(name)s %(message)s")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
