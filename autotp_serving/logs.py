"""One line per event, for readers or for machines. Every rank.

No line at any level holds the text of a prompt or of a completion.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any


class TextFormatter(logging.Formatter):
    """Lines as uvicorn writes them after month, day and time; the launcher puts the rank first."""

    def __init__(self, group: str = "") -> None:
        super().__init__()
        self._group = f"group {group}: " if group else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(record.created))
        return f"{when} {record.levelname + ':':<9} {self._group}{record.message}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what a call passes as `extra={"fields": {...}}` stands beside."""

    def __init__(self, rank: int, group: str = "") -> None:
        super().__init__()
        self._place = {"rank": rank, "group": int(group)} if group else {"rank": rank}

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._place,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging(
    level: str = "info", form: str = "text", rank: int = 0, group: str = ""
) -> None:
    """Send the log of this package and of uvicorn to stderr.

    Args:
        level: the least important lines to write.
        form: "text" or "json".
        rank: named in JSON lines.
        group: named in all lines, where there are several groups of ranks.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(rank, group) if form == "json" else TextFormatter(group))
    for name in ("autotp_serving", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
