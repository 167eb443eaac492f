"""Lines of the server's log for its console: kept until somebody takes them, the oldest let go."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Mapping
from typing import Any

from fedprune.core.errors import ProtocolError
from fedprune.core.text import one_line
from fedprune_server.terminal.log_lines import said_about
from fedprune_server.web.state.log_messages import LogLine

KEPT = 1000

_DEVICE = re.compile(r"\bdevice ([A-Za-z0-9][A-Za-z0-9_.-]{0,63})")
_LEVELS = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning"}


class LogTap(logging.Handler):
    """Takes lines from any thread."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: deque[LogLine] = deque(maxlen=KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line; whatever steers a terminal or begins another line is not in it."""
        try:
            text = one_line(record.getMessage(), 1500)
            found = _DEVICE.search(text)
            level = _LEVELS.get(record.levelno, "error")
            facts: dict[str, Any] = {n: v for n, v in said_about().items() if n in ("device", "job", "round")}
            if "device" not in facts and found:
                facts["device"] = found[1].rstrip(".")
            self._lines.append(_line(max(0.0, record.created), level, text, facts))
        except Exception:  # noqa: BLE001 - a line that can't be shown must not stop whoever wrote it
            self.handleError(record)

    def take(self, most: int) -> list[LogLine]:
        """The next lines, at most so many."""
        return [self._lines.popleft() for _ in range(min(most, len(self._lines)))]


def _line(at: float, level: str, text: str, facts: Mapping[str, Any]) -> LogLine:
    """A line with what it is about, as far as that can be: what a topic has in a device's place need be no name."""
    try:
        return LogLine(at, level, text, **facts)
    except ProtocolError:
        return LogLine(at, level, text)
