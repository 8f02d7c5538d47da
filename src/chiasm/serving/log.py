"""One JSON line per request on stderr, and one per mishap. No line holds an image or a file's name."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from datetime import UTC, datetime
from typing import Any

# Requests; what goes wrong within uvicorn, and what libraries warn of, comes out of the same lines.
LOGGERS = ("chiasm.serve", "uvicorn.error", "py.warnings")


class Lines(logging.Formatter):
    """A record as one JSON line: its time and level, its text as `event`, and what `extra={"fields": ...}` adds."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": " ".join(record.getMessage().split()),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def log_to_stderr(*, quiet: bool) -> logging.Handler:
    """Send the server's lines to stderr; with `quiet` warnings and errors alone. `stop_logging` undoes it."""
    # Pillow warns of every damaged tag, tens of thousands in one file; what cannot be read has its own answer.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.captureWarnings(True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.WARNING if quiet or name != LOGGERS[0] else logging.INFO)
    return handler


def stop_logging(handler: logging.Handler) -> None:
    """Leave the loggers as they were found."""
    logging.captureWarnings(False)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.removeHandler(handler)
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
