"""Collects lines of the server's log for the console."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedprune.core.errors import ProtocolError
from fedprune.core.text import one_line
from fedprune.output.log_lines import current_log_context
from fedprune.wire.topics import check_device
from fedprune_server.web.state.records import LogLine

# Lines that wait to be published; of more, the oldest are dropped. The server must not run out of memory if the file
# can't be written.
MAX_WAITING_LINES = 1000

_DEVICE_IN_TEXT = re.compile(r"\bdevice ([A-Za-z0-9][A-Za-z0-9_.-]{0,63})")
_LEVEL_NAMES = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning"}


class LogTap(logging.Handler):
    """Collects lines of the server's log, from any thread.

    `is_device` says whether a name that follows the word "device" in a line is a device's.
    """

    def __init__(self, is_device: Callable[[str], bool]) -> None:
        super().__init__(logging.INFO)
        self._is_device = is_device
        # Lines, and whether the device of each is only read from its text.
        self._lines: deque[tuple[LogLine, bool]] = deque(maxlen=MAX_WAITING_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line, without control characters."""
        try:
            text = one_line(record.getMessage(), 1500)
            facts: dict[str, Any] = {n: v for n, v in current_log_context().items() if n in ("device", "job", "round")}
            device_match = None if "device" in facts else _DEVICE_IN_TEXT.search(text)
            if device_match is not None:
                facts["device"] = device_match[1].rstrip(".")
            try:
                check_device(facts.get("device", "x"))
            except ProtocolError:  # part of a foreign topic, which need not be a device's name
                facts = {}
            level = _LEVEL_NAMES.get(record.levelno, "error")
            line = LogLine(max(0.0, record.created), level, text, **facts)
            self._lines.append((line, device_match is not None))
        except Exception:  # noqa: BLE001 - a line that can't be shown must not stop its author
            self.handleError(record)

    def take(self, most: int) -> list[LogLine]:
        entries = [self._lines.popleft() for _ in range(min(most, len(self._lines)))]
        return [
            replace(line, device=None) if is_guess and not self._is_device(line.device or "") else line
            for line, is_guess in entries
        ]
