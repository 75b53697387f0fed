"""One line per event, for operators, in the format of uvicorn's own lines. Every rank."""

from __future__ import annotations

import logging


def configure_logging(level: int = logging.INFO) -> None:
    """Send this package's log to stderr; the launcher puts the rank before each line."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s:     %(message)s"))
    package_logger = logging.getLogger("autotp_serving")
    package_logger.handlers = [handler]
    package_logger.propagate = False
    package_logger.setLevel(level)
