"""The checks of `fedprune-server doctor`: everything about a fleet that can be seen from the server's machine.

Nothing is changed. `fedprune-server check` (`maintenance.state_check`) reads the files themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprune.coordination import State
from fedprune.core.disk import held, read_file
from fedprune.core.errors import FedpruneError
from fedprune_server.devices.quarantine import read_rows
from fedprune_server.maintenance import site_doctor as site
from fedprune_server.maintenance.finding import Finding, of_alert, wrong
from fedprune_server.maintenance.fleet_doctor import Case, findings
from fedprune_server.monitoring.alerts import Snapshot, at, command, evaluate
from fedprune_server.monitoring.monitor import read_open
from fedprune_server.monitoring.site_facts import site_facts
from fedprune_server.storage.state_folder import LOCK, MODEL, folders
from fedprune_server.storage.storage import Storage


def examined(folder: Path, timeout: float = 5.0, clock: Callable[[], float] = time.time) -> list[Finding]:
    """All findings about a server and its fleet, the worst first.

    Args:
        folder: The state folder.
        timeout: Seconds for broker, database and bucket, each.
        clock: Seconds since 1970.

    Raises:
        StorageError: It is no server's state folder.
    """
    found = list(_examine(folder, timeout, clock()))
    return [a for a in found if a.wrong] + [a for a in found if not a.wrong]


def _examine(folder: Path, timeout: float, now: float) -> Iterator[Finding]:
    Storage.check_existing(folder)
    running = held(folder / LOCK)
    cases: list[Case] = []
    last: float | None = None
    for part in (folder, *folders(folder)):
        try:
            case, event_at = site.within(timeout, lambda part=part: _case(part, folder))  # type: ignore[misc]
        except FedpruneError as error:
            yield wrong(
                "database",
                f"the database of {part} can't be read: {error}",
                "it holds all that the job is",
                f"see that it runs and can be reached; then {command('check', *at(part))}, or restore a backup",
            )
            continue
        last = max(filter(None, (last, event_at)), default=None)
        cases.append(case)
        yield from findings(case)
    server: Mapping[str, Any] = cases[0].settings.get("server", {}) if cases else {}
    broken = list(site.identity(folder))
    yield from broken
    looks: tuple[Callable[[], Iterable[Finding]], ...] = (
        lambda: _alerts(folder, cases, server, now, running=running, members=not broken),
        lambda: site.clock(now, last),
        lambda: site.broker(folder, server, timeout, running=running),
        lambda: site.other_servers(folder, server, running=running),
        lambda: site.revocations(folder),
        lambda: () if broken else site.rotation(folder),
        lambda: site.bucket(server, timeout),
        lambda: site.crashes(folder, now),
        lambda: site.backups(folder, now),
    )
    found: set[str] = set()
    for look in looks:
        for finding in _looked(look, folder):
            if finding.kind != "broker" or "broker" not in found:
                yield finding
            found.add(finding.kind)


def _alerts(
    folder: Path, cases: Sequence[Case], server: Mapping[str, Any], now: float, *, running: bool, members: bool
) -> Iterator[Finding]:
    """Alerts that the state folder justifies, and others that a running server has open."""
    live = read_open(folder) if running else None
    rows = {n: str(r["reason"]) for n, r in sorted(read_rows(folder).items()) if (r["until"] or 0.0) > now}
    seen = Snapshot(
        folder,
        [case.status for case in cases],
        sum(case.here for case in cases),
        running,
        None if live is None else max(0.0, now - live[0]),
        quarantined=rows,
        site=site_facts(folder, server, members=members),
    )
    found = {a.key: a for a in evaluate(seen, now)}
    for alert in () if live is None else live[1]:
        found.setdefault(alert.key, alert)
    yield from map(of_alert, found.values())


def _looked(look: Callable[[], Iterable[Finding]], folder: Path) -> Iterator[Finding]:
    """The findings of a check; one that fails doesn't keep the others from running."""
    try:
        yield from look()
    except FedpruneError as error:
        yield wrong("unreadable", str(error), "it couldn't be looked at", command("check", *at(folder)))


def _case(folder: Path, site_folder: Path) -> tuple[Case, float | None]:
    """A job as it is stored, and the time of its last event; `site_folder` has the identity."""
    with Storage.existing(folder) as storage:
        settings, state = storage.settings() or {}, storage.load()
        outsiders, last = storage.outsiders(), storage.log.last_at()
    state = state or State(model="")
    sizes, names = _groups(folder)
    return Case(folder, settings, state, outsiders, held(folder / LOCK), sizes, names, site.revoked(site_folder)), last


def _groups(folder: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Sizes and names of the model's groups of channels; nothing where the model can't be read."""
    from fedprune_export.importing import import_onnx

    try:
        architecture = import_onnx(read_file(folder / MODEL), MODEL).architecture
    except (OSError, FedpruneError):
        return (), ()
    return tuple(architecture.sizes), tuple(g.name for g in architecture.groups)
