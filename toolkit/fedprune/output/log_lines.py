"""Log output of a long-running command: plain lines, or one JSON object per line, with the context of each record.

Text from a device can't start a log line of its own.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

TEXT, JSON = "text", "json"

_CONTEXT: ContextVar[Mapping[str, object]] = ContextVar("log_context", default={})  # noqa: B039 - it is never changed

# By job, and not in the context: an observer makes the traces, outside of the code that logs about the job.
_TRACE_IDS: dict[str, str] = {}


@contextmanager
def log_context(**fields: object) -> Iterator[None]:
    """Add fields, such as `job`, `round` and `device`, to what this thread logs; None is left out."""
    token = _CONTEXT.set({**_CONTEXT.get(), **{k: v for k, v in fields.items() if v is not None}})
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def mark_job(job: str, *, trace_id: str | None) -> None:
    """Add a trace's id to everything that any thread logs about a job from now on; None ends that."""
    if trace_id is None:
        _TRACE_IDS.pop(job, None)
    else:
        _TRACE_IDS[job] = trace_id


def current_log_context() -> Mapping[str, object]:
    context = _CONTEXT.get()
    trace_id = _TRACE_IDS.get(str(context.get("job")))
    return context if trace_id is None else {**context, "trace_id": trace_id}


class OneLineFormatter(logging.Formatter):
    """Plain text: a record is one line, whatever its words hold; a traceback follows, indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        return printable(super().formatMessage(record))

    def formatException(self, ei: object) -> str:  # noqa: N802 - the name is logging's
        """A traceback, indented: no line of it can look like a record."""
        text = super().formatException(ei)  # type: ignore[arg-type]
        return "\n".join(f"    {printable(line)}" for line in text.splitlines())


class JsonLinesFormatter(logging.Formatter):
    """A JSON object for each record: `at`, `level`, `message`, and `job`, `round`, `device`, `trace_id` where known."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        body: dict[str, object] = {
            "at": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "logger": record.name,
            **current_log_context(),
        }
        if record.exc_info:
            body["error"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)  # the context may hold values of any type


def printable(text: str) -> str:
    """A text with spaces in place of characters that steer a terminal or begin a new line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


@contextmanager
def log_to_stdout(*, verbose: bool, form: str = TEXT, stream: TextIO | None = None) -> Iterator[None]:
    """Write fedprune's log to stdout or another stream, and to nothing else, as `TEXT` or `JSON`; if `verbose`, with
    debug messages."""
    logger = logging.getLogger("fedprune")
    before = (logger.handlers[:], logger.level, logger.propagate)
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(
        JsonLinesFormatter() if form == JSON else OneLineFormatter("%(asctime)s %(message)s", "%H:%M:%S")
    )
    # No propagation: with a handler of the root logger, as tests and notebooks set one, each line would appear twice.
    logger.handlers[:], logger.propagate = [handler], False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
