"""The launcher: starts one of two installed releases, and goes back to the other when a new one fails.

Only `run`, the service, tries a release and changes the state; one is locked from its choice of a slot to its end.
Other commands start what is stable.

`releases.installer.launcher_archive` packs this module and those that it imports into one file next to the slots. It
imports the standard library alone, so that no update can break it. A trial's attempt is counted on the disk before the
release is started, so that a crash, a hang or a power cut uses it up.
"""

from __future__ import annotations

import os
import signal
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedprune_device.launcher.sd_notify import notify
from fedprune_device.launcher.slot_store import KEY_FILE, SlotRecord, SlotStore
from fedprune_device.launcher.state import (
    COMMITTED,
    STAGED,
    TRIAL,
    DamagedError,
    LauncherState,
    UpdateOutcome,
    flat_line,
)

VERSION = 1  # releases name the oldest launcher that can start them (`Release.launcher`)

_POLL_INTERVAL_S = 0.2  # between two looks at the child process
_STOP_TIMEOUT_S = 10.0  # from SIGTERM to SIGKILL
_STDERR_TIMEOUT_S = 2.0  # how long the end of a dead child's stderr is waited for
_MAX_STDERR_LINE = 2000  # bytes of a line of stderr
_NO_MESSAGE = "the last attempt ended without a message, as in a power cut"
# The program of a slot. The current folder is taken off the path, or a file in it could replace a module of the slot.
_START_CODE = """
import sys
from importlib import import_module
sys.path[:] = [p for p in sys.path if p]
module, _, function = sys.argv.pop(1).partition(":")
sys.argv[0] = module
sys.exit(getattr(import_module(module), function)())
"""

# Runs first in the process of a release on trial: the process ends when its launcher ends, also if that is killed. An
# orphan would hold the state directory's lock, and a launcher that is started again could run no release.
_END_WITH_LAUNCHER_CODE = """
import os, signal
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG, of Linux
except (ImportError, OSError, AttributeError, TypeError):
    pass
if os.getppid() != {launcher}:
    os._exit(1)
"""


@dataclass(frozen=True)
class SlotExit:
    """How a started release ended. `code` is the launcher's exit code if it ends, too; `was_stopped` by a signal."""

    reason: str
    code: int = 1
    was_stopped: bool = False


Run = Callable[[str, SlotRecord, LauncherState | None], SlotExit]


def choose_slot(home: SlotStore, locks: ExitStack) -> tuple[str, SlotRecord, LauncherState]:
    """Choose the service's slot, which `locks` keep as it is. An attempt of a trial is counted on the disk by then.

    The state's phase is `TRIAL` if the slot is on trial. Raises `DamagedError` if nothing can be started.
    """
    with home.lock_state():
        state = home.load() or home.save(home.recovered_state())
        if state.phase == TRIAL and state.left <= 0:
            trouble = f" ({state.trouble})" if state.trouble else ""
            state = home.save(state.roll_back(_NO_MESSAGE + trouble))
        if state.phase == TRIAL:
            try:
                record = locks.enter_context(home.use_slot(state.other_slot))
                return state.other_slot, record, home.save(state.use_attempt())
            except DamagedError as error:
                state = home.save(state.roll_back(f"not what was staged: {error}"))
        if state.phase == STAGED:
            lapsed = state.left <= 0
            state = home.save(state.roll_back("staged, but not begun in time") if lapsed else state.use_attempt())
        slot, record, reason = _intact_slot(home, state, locks)
        if slot != state.stable:
            version = state.highest
            with suppress(DamagedError):
                version = home.record(state.stable).version
            state = home.save(state.fall_back(version, f"{reason}; version {record.version} serves"))
        return slot, record, state


def _intact_slot(home: SlotStore, state: LauncherState, locks: ExitStack) -> tuple[str, SlotRecord, str]:
    """The stable slot, or if it is damaged the other one, with the reason. Nothing is written."""
    try:
        return state.stable, locks.enter_context(home.use_slot(state.stable)), ""
    except DamagedError as error:
        reason = str(error)
    try:
        return state.other_slot, locks.enter_context(home.use_slot(state.other_slot)), reason
    except DamagedError:
        if home.key() is not None:
            raise DamagedError(reason) from None  # only what the server has signed is started
    # A damaged slot may still run: trying it is better than a board that stays offline.
    return state.stable, locks.enter_context(home.use_slot(state.stable, damaged=True)), reason


def launch(home: SlotStore, arguments: Sequence[str], run: Run) -> int:
    """Start the service, or another command of the runtime; returns the exit code.

    `run` starts a slot and returns when it has ended; a slot on trial gets the state, whose deadline it keeps.
    """
    if arguments[:1] == ["run"] and not {"-h", "--help"} & set(arguments):
        return run_service(home, run)
    with ExitStack() as locks:
        slot, record, _ = _intact_slot(home, home.load() or home.recovered_state(), locks)
        return run(slot, record, None).code


def run_service(home: SlotStore, run: Run) -> int:
    """Start the slot that `choose_slot` chooses, and after a failed trial the next one, until `run` has ended."""
    with home.lock_service():
        while True:
            with ExitStack() as locks:
                slot, record, state = choose_slot(home, locks)
                on_trial = state.phase == TRIAL
                slot_exit = run(slot, record, state if on_trial else None)
            if not on_trial:
                return slot_exit.code
            with home.lock_state():
                after = home.load()
                if after is not None and after.phase == TRIAL and after.highest == state.highest:
                    trouble = after.trouble if after.sequence > state.sequence else ""
                    home.save(after.fail_attempt(f"{slot_exit.reason} ({trouble})" if trouble else slot_exit.reason))
            committed = UpdateOutcome(state.highest, COMMITTED)
            if slot_exit.was_stopped or (after is not None and after.outcome == committed):
                return slot_exit.code


class SlotRunner:
    """Runs slots as processes of this Python, with the runtime's arguments."""

    def __init__(self, home: SlotStore, arguments: Sequence[str]) -> None:
        self._home = home
        self._arguments = list(arguments)
        self._stop_signal = 0
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self, slot: str, record: SlotRecord, state: LauncherState | None) -> SlotExit:
        """Start a stable slot in place of this process, or one on trial as a child process."""
        command = [sys.executable, "-c", _START_CODE, record.entry, *self._arguments]
        environment = {
            **os.environ,
            "FEDPRUNE_ROOT": str(self._home.root),
            "FEDPRUNE_SLOT": slot,
            "PYTHONPATH": str(self._home.root / slot),
            "PYTHONDONTWRITEBYTECODE": "1",  # a slot may only have the files of its record
            "PYTHONNOUSERSITE": "1",
        }
        if state is None:
            os.execve(sys.executable, command, environment)  # noqa: S606  # nosec B606  # no shell is involved
        command[2] = _END_WITH_LAUNCHER_CODE.format(launcher=os.getpid()) + _START_CODE
        notify(f"STATUS=trying version {record.version}\nEXTEND_TIMEOUT_USEC={int((state.seconds + 30) * 1e6)}")
        old_handlers = {number: signal.signal(number, self._on_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        # It inherits the locks, and no other files.
        self._child = child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, close_fds=False)  # noqa: S603  # nosec B603  # this Python, with a slot of the launcher's own folder
        stderr_tail = StderrTail(child.stderr)
        deadline = time.monotonic() + state.seconds
        while child.poll() is None and time.monotonic() < deadline and not self._stop_signal:
            time.sleep(_POLL_INTERVAL_S)
        after = self._home.load()
        is_late = not self._stop_signal and child.poll() is None and after is not None and after.phase == TRIAL
        if is_late or self._stop_signal:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(_STOP_TIMEOUT_S)
            child.kill()
        child.wait()  # a committed release keeps running; the launcher waits for its end
        # With the old handlers a stop ends the launcher; `_on_stop` would only note it while the next release starts.
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        code = child.returncode
        ending = f"killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        reason = f"not healthy within {state.seconds:g} s" if is_late else f"{ending} before it was healthy"
        last_line = stderr_tail.read() if code > 0 and not is_late else ""
        reason += f": {last_line}" if last_line else ""
        return SlotExit(reason, 0 if self._stop_signal else code if code >= 0 else 128 - code, bool(self._stop_signal))

    def _on_stop(self, number: int, _frame: object) -> None:
        """Pass a stop on to the release; a second stop kills it."""
        if self._child is not None:
            self._child.send_signal(signal.SIGKILL if self._stop_signal else signal.SIGTERM)
        self._stop_signal = number


class StderrTail:
    """Passes on what a process writes to stderr, and keeps the last line that isn't empty."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        self._stream = stream
        self._last = b""
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def read(self) -> str:
        self._thread.join(_STDERR_TIMEOUT_S)  # a child of it may hold the stream open
        return flat_line(self._last.decode(errors="replace"))

    def _forward(self) -> None:
        if self._stream is None:
            return
        with self._stream as stream:
            while piece := stream.readline(_MAX_STDERR_LINE):
                self._last = piece if piece.strip() else self._last
                with suppress(OSError):
                    sys.stderr.buffer.write(piece)
                    sys.stderr.buffer.flush()


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"


def main() -> int:
    home = SlotStore(Path(os.environ.get("FEDPRUNE_ROOT") or Path(sys.argv[0]).resolve().parent))
    try:
        if home.key() is None:
            warning = f"{home.root} has no {KEY_FILE}: slots are checked for damage, not for who made them"
            print(warning, file=sys.stderr)
        return launch(home, sys.argv[1:], SlotRunner(home, sys.argv[1:]))
    except BlockingIOError as error:
        print(f"error: {error.strerror}", file=sys.stderr)
        return 31
    except (DamagedError, OSError) as error:
        print(f"error: {flat_line(str(error))}. Install the runtime again.", file=sys.stderr)
        return 31


if __name__ == "__main__":
    sys.exit(main())
