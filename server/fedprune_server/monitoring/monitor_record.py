"""The file `alerts.json` of a state folder: the open alerts, and when the server's loop turned last.

The server's monitor writes it. `fedprune-server doctor` and `status` read it: they are other processes, and must work
while the server hangs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedprune.core.disk import has_lock_holder
from fedprune.core.errors import StorageError
from fedprune.core.records import decode_record
from fedprune_server.monitoring.alert_rules import ALERT_SEVERITIES
from fedprune_server.monitoring.alerts import Alert
from fedprune_server.storage.folder_lock import LOCK_FILE, run_id

ALERTS_FILE = "alerts.json"


@dataclass(frozen=True)
class MonitorRecord:
    """The content of `alerts.json`.

    Attributes:
        turned_at: When the server's loop turned last, in seconds since 1970; None if nothing was written, or the file
            is damaged.
        alerts: The open alerts.
        notified_alerts: Alerts whose opening was notified, but not their end.
        free_boards: Boards that are connected, and that no job uses.
        run_id: The run of the server that wrote it (`storage.folder_lock.run_id`).
        closing_keys: Keys of open alerts whose cause has gone. They close unless the cause comes again.
    """

    turned_at: float | None = None
    alerts: Sequence[Alert] = ()
    notified_alerts: Sequence[Alert] = ()
    free_boards: frozenset[str] = frozenset()
    run_id: str = ""
    closing_keys: frozenset[str] = frozenset()

    @property
    def current_alerts(self) -> list[Alert]:
        """Open alerts whose cause lasts: what is wrong now."""
        return [alert for alert in self.alerts if alert.key not in self.closing_keys]


def read_running_monitor(folder: Path) -> MonitorRecord:
    """The record of a running server's monitor, some seconds old; empty if none runs, or it is still starting."""
    recorded = read_monitor_record(folder) if has_lock_holder(folder / LOCK_FILE) else MonitorRecord()
    return recorded if recorded.run_id == run_id(folder) else MonitorRecord()


def read_monitor_record(folder: Path) -> MonitorRecord:
    """The last record of a folder's monitor, which is old if its server has ended."""
    try:
        recorded = decode_record(MonitorRecord, (folder / ALERTS_FILE).read_bytes(), ALERTS_FILE, StorageError)
    except (OSError, StorageError):
        return MonitorRecord()
    known_alerts = [a for a in recorded.alerts if a.severity in ALERT_SEVERITIES.get(a.kind, ())]
    return replace(recorded, alerts=known_alerts)
