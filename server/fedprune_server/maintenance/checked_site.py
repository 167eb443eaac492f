"""A server as the checks of `fedprune-server doctor` see it, and the limit of the time that a check may take."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedprune.core.errors import FedpruneError
from fedprune_server.config.network_settings import EMBEDDED
from fedprune_server.maintenance.stored_job import StoredJob
from fedprune_server.monitoring.monitor_record import MonitorRecord

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class CheckedSite:
    """A server and its state folder.

    Attributes:
        settings: The table [server] of the configuration.
        is_running: Whether a server runs on the folder, and with it the embedded broker; a standby server doesn't run.
        leader: Host and folder of the server that has the job, if its folder is another one; empty otherwise.
        has_identity: Whether there is an undamaged identity.
        last_event_at: When a job last handled an event, in seconds since 1970; None if unknown.
        monitor_record: What a running server's monitor has written.
        timeout_s: Seconds for broker, database and bucket, each.
        now: Seconds since 1970.
    """

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_running: bool = False
    leader: str = ""
    has_identity: bool = False
    jobs: Sequence[StoredJob] = ()
    last_event_at: float | None = None
    monitor_record: MonitorRecord = field(default_factory=MonitorRecord)
    timeout_s: float = 5.0
    now: float = field(default_factory=time.time)

    @property
    def broker(self) -> str:
        return str(self.settings.get("broker", EMBEDDED))

    @property
    def ca(self) -> Path | None:
        return Path(self.settings["ca"]) if self.settings.get("ca") else None


class TooSlowError(FedpruneError):
    """Something didn't answer in time."""


def run_within(seconds: float, work: Callable[[], _T]) -> _T:
    """Call `work` on a thread, and return or raise what it does. Raises `TooSlowError` after `seconds`; then the thread
    is abandoned, since nothing can end a system call that waits."""
    answers: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:  # noqa: BLE001 - it is raised again below
            answers.put((None, error))

    threading.Thread(target=run, name="doctor", daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TooSlowError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]
