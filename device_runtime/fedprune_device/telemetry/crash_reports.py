"""Crashes of a board's service: recorded while it ends, or detected at the next start.

An exception that ends the service, or one of its threads, is written by the run itself. After a fault in native code
there is the text that Python's faulthandler could write. A killed run leaves only the mark of its start, as a power cut
does, which is no crash: the number of the boot tells one from the other.

The last warnings are kept, too, and reported at every birth: nobody can log in behind a NAT.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from fedprune import __version__
from fedprune.core import atomic_file
from fedprune.core.disk import open_own_file
from fedprune.core.errors import BrokerError, FedpruneError, IdentityError, JoinError
from fedprune.wire.fleet_messages import MAX_CRASH_TEXT, MAX_FRAMES
from fedprune.wire.messages import MAX_WARNING_TEXT, MAX_WARNINGS, BoardWarning
from fedprune_device.hardware.readings import memory, temperature_c
from fedprune_device.privacy.redaction import WITHHELD, error_name, module_of, module_of_file, redact

_LOG = logging.getLogger("fedprune.device")

# Files in the board's state directory: a crash that the server hasn't stored yet, the mark of the current run, and the
# output of faulthandler.
CRASH_FILE = "crash.json"
MARK_FILE = "running.json"
FAULT_FILE = "fault.txt"

_SAFE_CAUSES = ("signal", "killed")  # causes whose texts don't quote an exception

_MAX_FAULT_BYTES = 65_536  # bytes of faulthandler's text that are read
_FATAL = re.compile(r"^(?:Fatal Python error|Windows fatal exception): (.{1,200})$", re.MULTILINE)
_BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")


_FAULT_FRAME = re.compile(r'^  File "([^"\n]{1,4096})", line ([0-9]{1,9}) in ([^\n]{1,128})$')


class CrashReports:
    """The crashes of runs. `boot` identifies the boot; if `withholds_text`, only an exception's name is reported."""

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], float] = time.time,
        boot: Callable[[], str] | None = None,
        withholds_text: Callable[[], bool] = lambda: False,
    ) -> None:
        self._withholds_text = withholds_text
        self._folder, self._clock = folder, clock
        self._boot = boot or _boot_id
        self._started_at = clock()
        self._write_lock = threading.Lock()  # threads may end at the same time

    @property
    def report(self) -> dict[str, Any] | None:
        """The fields of the `CrashReport` that the server should get, if there is one, except the device."""
        try:
            report = atomic_file.read_document(self._folder / CRASH_FILE)
        except FedpruneError:
            self.delete_report()
            return None
        if not isinstance(report, dict):
            return None
        if self._withholds_text() and report.get("cause") not in _SAFE_CAUSES:
            name, words, _ = str(report.get("text", "")).partition(":")
            report["text"] = f"{name if words and name.isidentifier() else 'an error'} {WITHHELD}"
        return report

    def delete_report(self) -> None:
        with contextlib.suppress(FedpruneError):
            atomic_file.remove_durably(self._folder / CRASH_FILE)

    def record_exception(self, error: BaseException, cause: str = "exception") -> None:
        """Write down an exception that ends the service, or a thread of it."""
        message = f"{error_name(error)}: {WITHHELD}" if self._withholds_text() else f"{type(error).__name__}: {error}"
        text = redact(message, MAX_CRASH_TEXT)
        self._write(cause, text, exception_frames(error.__traceback__), self._clock() - self._started_at)

    @contextlib.contextmanager
    def watch_run(self) -> Iterator[None]:
        """Detect how the last run ended, then run the body and record how it ends."""
        self._detect_last_crash()
        self._write_mark()
        previous_hook = threading.excepthook

        def hook(arguments: Any) -> None:
            if arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
                self.record_exception(arguments.exc_value, "thread")
            previous_hook(arguments)

        enabled = faulthandler.is_enabled()
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                fault = stack.enter_context(os.fdopen(open_own_file(self._folder / FAULT_FILE, flags), "wb"))
                faulthandler.enable(fault)
            threading.excepthook = hook
            try:
                yield
            except (KeyboardInterrupt, SystemExit, IdentityError, JoinError, BrokerError):
                raise  # no crash: it was stopped, an operator hasn't approved yet, or the broker isn't there
            except BaseException as error:
                self.record_exception(error, "error" if isinstance(error, FedpruneError) else "exception")
                raise
            finally:
                threading.excepthook = previous_hook
                faulthandler.disable()
                if enabled and sys.__stderr__ is not None:
                    with contextlib.suppress(OSError, ValueError):
                        faulthandler.enable(sys.__stderr__)
                with contextlib.suppress(FedpruneError):
                    atomic_file.remove_durably(self._folder / MARK_FILE)
                with contextlib.suppress(OSError):
                    (self._folder / FAULT_FILE).unlink(missing_ok=True)

    def _detect_last_crash(self) -> None:
        """The trace of the last run: a fault, or the mark of a killed one."""
        mark, fault = self._read_mark(), self._read_fault()
        report_path = self._folder / CRASH_FILE
        fatal_error = _FATAL.search(fault)
        if fatal_error is not None:
            self._write("signal", redact(fatal_error[1], MAX_CRASH_TEXT), fault_frames(fault), None, mark)
        elif mark is not None and not report_path.exists() and self._ended_here(mark):
            text = "the process ended without an error: killed by the system for lack of memory, or by a user"
            self._write("killed", text, [], None, mark)
        else:
            return
        crash = self.report
        if crash is not None:
            _LOG.warning("the last run crashed: %s", crash.get("text", ""))

    def _write(
        self,
        cause: str,
        text: str,
        frames: list[dict[str, Any]],
        uptime: float | None,
        mark: dict[str, Any] | None = None,
    ) -> None:
        state = mark or self._run_facts()
        available_memory = state.get("memory_available")
        now = max(0.0, self._clock())
        body = {
            "number": int(1000 * now),
            "at": int(now),
            "cause": cause,
            "text": text,
            "frames": frames,
            "release": str(state.get("release", ""))[:256],
            "slot": str(state.get("slot", ""))[:64],
            "uptime_s": None if uptime is None else round(max(0.0, min(uptime, 1e11)), 1),
            "temperature_c": None if mark else temperature_c(),
            "memory_available": available_memory if isinstance(available_memory, int) else None,
            "memory_total": state.get("memory_total") if isinstance(state.get("memory_total"), int) else None,
        }
        with self._write_lock, contextlib.suppress(FedpruneError):  # a full disk must not hide the crash's own error
            atomic_file.write_document(self._folder / CRASH_FILE, body)

    def _run_facts(self) -> dict[str, Any]:
        total, free = memory()
        return {
            "release": f"fedprune {__version__}",
            "slot": os.environ.get("FEDPRUNE_SLOT", ""),
            "memory_total": total,
            "memory_available": free,
        }

    def _write_mark(self) -> None:
        place = {"boot": self._boot(), "folder": self._folder_inode()}
        body = {**self._run_facts(), **place, "begun": int(self._started_at)}
        body.pop("memory_available")  # the memory at the start says nothing about the end
        with contextlib.suppress(FedpruneError):
            atomic_file.write_document(self._folder / MARK_FILE, body)

    def _ended_here(self, mark: dict[str, Any]) -> bool:
        """Whether a run that has left its mark ended on this board, without a power cut.

        A copy of a running board's card or folder has the mark of a run that never ended: its inode is another one.
        """
        boot, folder = mark.get("boot"), mark.get("folder")
        return bool(boot) and boot == self._boot() and folder == self._folder_inode()

    def _folder_inode(self) -> int:
        """The folder's inode number, which a copy of the folder doesn't have."""
        try:
            return self._folder.stat().st_ino
        except OSError:
            return 0

    def _read_mark(self) -> dict[str, Any] | None:
        try:
            mark = atomic_file.read_document(self._folder / MARK_FILE)
        except FedpruneError:
            return None
        return mark if isinstance(mark, dict) else None

    def _read_fault(self) -> str:
        try:
            with (self._folder / FAULT_FILE).open("rb") as file:
                return file.read(_MAX_FAULT_BYTES).decode(errors="replace")
        except OSError:
            return ""


class WarningLog(logging.Handler):
    """Keeps the latest warnings and errors of the program's log, each text once, with the time of its last line.

    Texts are redacted as those of crashes are. If `withholds_text`, only the place in the program is reported.
    """

    def __init__(self, withholds_text: Callable[[], bool] = lambda: False) -> None:
        super().__init__(logging.WARNING)
        self._withholds_text = withholds_text
        # Time, text, and what may be said of it where texts are withheld. The policy that holds is that of the report.
        self._warnings: list[tuple[int, str, str]] = []

    @contextlib.contextmanager
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


def _boot_id() -> str:
    try:
        return _BOOT_ID_FILE.read_text(encoding="ascii", errors="replace").strip()[:64]
    except OSError:
        return ""


def exception_frames(trace: TracebackType | None) -> list[dict[str, Any]]:
    """The innermost frames of an exception, by module and line."""
    rows = []
    for frame, line in traceback.walk_tb(trace):
        module = module_of(str(frame.f_globals.get("__name__", "")))
        ours = module.startswith("fedprune")
        line, function = (line, frame.f_code.co_name[:128]) if ours else (0, "")
        rows.append({"module": module, "line": line, "function": function})
    return rows[::-1][:MAX_FRAMES]


def fault_frames(fault: str) -> list[dict[str, Any]]:
    """The frames of the thread in which a fault happened, of what faulthandler wrote."""
    rows: list[dict[str, Any]] = []
    current = False
    for text in fault.splitlines():
        if text.startswith(("Current thread", "Stack (most recent call first)")):
            current = True
        elif current and (frame := _FAULT_FRAME.match(text)):
            module = module_of_file(frame[1])
            ours = module.startswith("fedprune")
            function = redact(frame[3], 128) if ours else ""
            rows.append({"module": module, "line": int(frame[2]) if ours else 0, "function": function})
        elif current and not text.startswith("  "):
            break
    return rows[:MAX_FRAMES]
