"""JSON lines on stderr: one object a record, with the service, the request and the trace that it belongs to."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from pathlib import Path

from honed.kit import trace_context

request_id: ContextVar[str] = ContextVar("honed_request_id", default="")
"""The id of the call that is being served, empty outside of one."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object; whatever is passed as `extra` becomes a key of its own."""

    def __init__(self, service: str) -> None:
        """`service` stands in each line."""
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Renders the record."""
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := request_id.get():
            line["request_id"] = request
        if (trace := trace_context.current.get()) is not None:
            line["trace_id"], line["span_id"] = trace.trace_id, trace.span_id
        line.update({k: v for k, v in vars(record).items() if k not in _STANDARD})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(service: str, level: str = "INFO") -> None:
    """Sends the process's records to stderr as JSON; replaces whatever was set before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for chatty in ("httpx", "httpcore", "filelock", "urllib3", "fsspec", "alembic.runtime.plugins"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Whatever the level of the rest is: who changed the system, and how far a job is, for whoever follows its log.
    for always in ("honed.audit", "honed.kit.progress"):
        logging.getLogger(always).setLevel(logging.INFO)


def log_to(path: Path) -> None:
    """Lets the log of this process go to a file from now on, for a process whose terminal shows something else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(path.open("a", encoding="utf-8"))
