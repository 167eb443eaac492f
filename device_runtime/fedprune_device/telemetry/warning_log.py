"""The last warnings of the board's program, which its births bring to the server: nobody can log in behind a NAT."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedprune.wire.messages import MAX_WARNING_TEXT, MAX_WARNINGS, BoardWarning
from fedprune_device.privacy.redaction import WITHHELD, error_name, module_of_file, redact


class WarningLog(logging.Handler):
    """Keeps the latest warnings and errors of the program's log, each text once, with the time of its last line.

    Texts are redacted as those of crashes are. If `withholds_text`, only the place in the program is reported.
    """

    def __init__(self, withholds_text: Callable[[], bool] = lambda: False) -> None:
        super().__init__(logging.WARNING)
        self._withholds_text = withholds_text
        # Time, text, and what may be said of it where texts are withheld. The policy that holds is that of the report.
        self._warnings: list[tuple[int, str, str]] = []

    @contextmanager
    def watch_log(self) -> Iterator[None]:
        logger = logging.getLogger("fedprune")
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            error = record.exc_info[1] if record.exc_info else None
            text = record.getMessage() if error is None else f"{record.getMessage()}: {error_name(error)}: {error}"
            text = redact(text, MAX_WARNING_TEXT)
            place = f"{module_of_file(record.pathname)}, line {record.lineno} {WITHHELD}"[:MAX_WARNING_TEXT]
            others = [warning for warning in self._warnings if warning[1] != text]
            self._warnings = [*others, (max(0, int(record.created)), text, place)][-MAX_WARNINGS:]
        except Exception:  # noqa: BLE001 - a line that can't be kept must not stop its author
            self.handleError(record)

    def report(self) -> tuple[BoardWarning, ...]:
        withholds = self._withholds_text()
        latest = {place if withholds else text: at for at, text, place in self._warnings}
        return tuple({"at": at, "text": text} for text, at in latest.items())
