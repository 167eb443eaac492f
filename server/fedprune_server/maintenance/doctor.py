"""`fedprune-server doctor`: checks of everything about a fleet that can be seen from the server's machine.

Nothing is changed. `fedprune-server check` (`maintenance.state_check`) reads the files themselves.
"""

from __future__ import annotations

import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedprune.coordination import State
from fedprune.core.disk import held, read_file
from fedprune.core.errors import FedpruneError
from fedprune.core.text import quantity, some
from fedprune.model.recipe import Recipe
from fedprune.security.authority import CRL
from fedprune.wire.chunk import MAX_PACKET, PACKET_OVERHEAD
from fedprune.wire.link import Link
from fedprune.wire.topics import Topics
from fedprune_server.config.alert_settings import OFF
from fedprune_server.config.server_config import EMBEDDED, LOCAL, without_password
from fedprune_server.devices.board_logs import read_logs
from fedprune_server.devices.quarantine import read_rows
from fedprune_server.enrollment.pki import FOLDER as IDENTITY
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.executor.divergence import is_uncalibrated
from fedprune_server.maintenance.backup_manifest import last_backup
from fedprune_server.maintenance.finding import Finding, note, of_alert, wrong
from fedprune_server.maintenance.identity_check import check_identity, revoked
from fedprune_server.maintenance.job_checks import Case, findings
from fedprune_server.messaging.broker.revocations import NOTE, delivered
from fedprune_server.messaging.leadership import ServerInstance, described, leadership
from fedprune_server.monitoring.alerts import MAX_NAMES_SHOWN, MISSING_BOARDS, command, evaluate_alerts, state_args
from fedprune_server.monitoring.monitor import Recorded, read_recorded
from fedprune_server.monitoring.participation import format_minute, quarantine_absence
from fedprune_server.monitoring.site_facts import site_facts
from fedprune_server.monitoring.snapshot import Snapshot, TierStatus
from fedprune_server.storage.database import DatabaseLockedError, LostConnectionError, translated
from fedprune_server.storage.lease import leader_elsewhere
from fedprune_server.storage.s3.bucket import FOLDER as IN_FOLDER
from fedprune_server.storage.s3.bucket import Bucket
from fedprune_server.storage.sqlite_file import write_lock_holders
from fedprune_server.storage.state_folder import FILE, LOCK, MODEL, folders
from fedprune_server.storage.storage import Storage

if TYPE_CHECKING:
    from fedprune_export.pruning.model import Model

_DAY_S = 24 * 3600.0
_BACKUP_S = 7 * _DAY_S
_AHEAD_S = 120.0
LOCK_S = 2.0
"""How long a lock is waited for that somebody may keep: no transaction of ours lasts so long."""

_EARLIEST = 1_750_000_000
"""No clock that is right shows an earlier time, in seconds since 1970."""

_T = TypeVar("_T")


class TooSlowError(FedpruneError):
    """Something didn't answer in time."""


@dataclass(frozen=True)
class Site:
    """A server, as its checks see it.

    Attributes:
        server: Settings of the table [server].
        running: Whether a server runs on the folder, and with it the embedded broker; one that stands by doesn't.
        leader: Host and folder of the server that has the job, if that is one with another folder.
        members: Whether there is an identity, and it is whole.
        last_event: When a job last handled an event, in seconds since 1970; None if unknown.
        live: What a running server's monitor has written.
        timeout: Seconds for broker, database and bucket, each.
        now: Seconds since 1970.
    """

    folder: Path
    server: Mapping[str, Any] = field(default_factory=dict)
    running: bool = False
    leader: str = ""
    members: bool = False
    cases: Sequence[Case] = ()
    last_event: float | None = None
    live: Recorded = field(default_factory=Recorded)
    timeout: float = 5.0
    now: float = field(default_factory=time.time)

    @property
    def broker(self) -> str:
        return str(self.server.get("broker", EMBEDDED))

    @property
    def ca(self) -> Path | None:
        return Path(self.server["ca"]) if self.server.get("ca") else None


def examined(folder: Path, timeout: float = 5.0) -> list[Finding]:
    """All findings about a server and its fleet, the worst first. Raises `StorageError` if it is no server's state
    folder."""
    found = list(_examine(folder, timeout))
    if any(a.kind == "second-server" for a in found):
        found = [a for a in found if a.kind != "server-not-running"]  # a start here would take the fleet back
    if any(a.kind == "broker" for a in found):
        found = [a for a in found if a.kind not in MISSING_BOARDS]  # without a broker no board can be there
    return [a for a in found if a.wrong] + [a for a in found if not a.wrong]


def _examine(folder: Path, timeout: float) -> Iterator[Finding]:
    Storage.check_existing(folder)
    broken = list(identity(folder))
    gone, members = frozenset[str](), not broken and (folder / IDENTITY).is_dir()
    try:
        gone = within(timeout, lambda: revoked(folder)) if members else gone
    except FedpruneError:  # whose database it is, the folder's own, is told below
        members = False
    live = read_recorded(folder) if held(folder / LOCK) else Recorded()
    away = frozenset(region.name for region in live.regions)
    leader = ""
    with suppress(FedpruneError):  # a database that can't be read is a finding below
        leader = within(timeout, lambda: leader_elsewhere(folder))
    cases: list[Case] = []
    events: list[float] = []
    for part in (folder, *folders(folder)):
        try:
            case, event_at = within(timeout, lambda part=part: _case(part, gone, away, leader))  # type: ignore[misc]
        except FedpruneError as error:
            yield _unreadable(part, error)
            members = members and part != folder
            continue
        events += [] if event_at is None else [event_at]
        cases.append(replace(case, alerted=frozenset(a.device for a in live.alerts if a.device is not None)))
        yield from findings(cases[-1])
    yield from broken
    server: Mapping[str, Any] = cases[0].settings.get("server", {}) if cases else {}
    running = held(folder / LOCK) and not leader
    site = Site(folder, server, running, leader, members, cases, max(events, default=None), live, timeout)
    found: set[str] = set()
    for check in CHECKS:
        for finding in _checked(check, site):
            if finding.kind != "broker" or "broker" not in found:
                yield finding
            found.add(finding.kind)


def _unreadable(folder: Path, error: FedpruneError) -> Finding:
    if isinstance(error, (LostConnectionError, DatabaseLockedError, TooSlowError)):
        advice = "see that it runs, that this machine reaches it, and who has locked it; the server goes on by itself"
    else:
        advice = f"{command('check', *state_args(folder))}, or restore a backup"
    return wrong("database", f"the database of {folder} can't be read: {error}", "it holds all that the job is", advice)


def _checked(check: Callable[[Site], Iterable[Finding]], site: Site) -> Iterator[Finding]:
    """The findings of a check; one that fails doesn't keep the others from running."""
    try:
        yield from check(site)
    except FedpruneError as error:
        yield wrong("unreadable", str(error), "it couldn't be looked at", command("check", *state_args(site.folder)))


def within(seconds: float, work: Callable[[], _T]) -> _T:
    """The result or error of `work`; after too long it is abandoned, with a `TooSlowError`."""
    answers: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:  # noqa: BLE001 - it is raised again below
            answers.put((None, error))

    threading.Thread(target=run, name="doctor", daemon=True).start()
    try:
        found, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TooSlowError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return found  # type: ignore[no-any-return]


def _case(folder: Path, gone: frozenset[str], away: frozenset[str], leader: str) -> tuple[Case, float | None]:
    """A job as it is stored, and the time of its last event."""
    with Storage.existing(folder) as storage:
        settings, state = storage.settings() or {}, storage.load()
        outsiders, last = storage.outsiders(), storage.log.last_at()
    running = held(folder / LOCK) or bool(leader)
    case = Case(folder, settings, state or State(model=""), outsiders, running, revoked=gone, away=away)
    if (model := _model(folder)) is None:
        return case, last
    architecture, recipe = model.architecture, Recipe.from_dict(case.job.get("recipe", {}))
    return replace(
        case,
        groups=tuple(architecture.sizes),
        names=tuple(g.name for g in architecture.groups),
        uncalibrated=is_uncalibrated(architecture, recipe, settings.get("calibration"), model.frozen),
    ), last


def _model(folder: Path) -> Model | None:
    """The model with which a job began; None where it can't be read."""
    from fedprune_export.importing import import_onnx

    try:
        return import_onnx(read_file(folder / MODEL), MODEL)
    except (OSError, FedpruneError):
        return None


def alerts(site: Site) -> Iterator[Finding]:
    """Alerts that the state folder justifies, and others that a running server has open."""
    live = site.live
    rows = sorted(read_rows(site.folder).items()) if site.running else []
    absences = {n: quarantine_absence(str(r["reason"]), site.now) for n, r in rows if (r["until"] or 0.0) > site.now}
    parent = str(site.server.get("parent", OFF))
    seen = Snapshot(
        site.folder,
        [case.status for case in site.cases],
        sum(case.here for case in site.cases),
        site.running or bool(site.leader),
        None if live.turned_at is None else max(0.0, site.now - live.turned_at),
        tier=TierStatus(parent if parent != OFF else "", live.parent_lost, live.regions),
        absences=absences,
        site=site_facts(site.folder, site.server, members=site.members),
    )
    found = {a.key: a for a in evaluate_alerts(seen, site.now)}
    for alert in live.alerts:
        found.setdefault(alert.key, alert)
    yield from map(of_alert, found.values())


def identity(folder: Path) -> Iterator[Finding]:
    if (folder / IDENTITY).is_dir():
        for finding in check_identity(folder / IDENTITY):
            advice = finding.advice or "See docs/back-up.md#check."
            why = "without it the server can't prove its identity to boards"
            yield replace(finding, kind="identity", why=why, advice=advice)


def rotation(site: Site) -> Iterator[Finding]:
    """Boards that don't know the server's present keys, and a replacement of the authority that can end."""
    folder = site.folder
    if not site.members:
        return
    with IdentityFolder(folder, read_only=True) as opened:
        behind = {d.device: d.server_key for d in opened.store.devices() if "signing key" in opened.behind(d)}
        chain = {s.before.id.hex() for s in opened.successions}
        rotating, left = opened.authority.rotating, opened.without_new_certificate()
    if names := [name for name, key in behind.items() if key not in chain]:
        yield wrong(
            "foreign-key",
            f"{quantity(len(names), 'board')} last knew the server by a signing key that successions.json doesn't lead "
            f"from: {some(names)}",
            "they don't hear this server",
            "restore signing.key and successions.json from the latest backup; or let these boards join again, with "
            + command("devices", "replace", "NAME", *state_args(folder)),
        )
    if names := [name for name, key in behind.items() if key in chain]:
        yield note(
            "signing-key",
            f"{quantity(len(names), 'board')} last connected before the signing key was replaced: {some(names)}",
            "they follow when they connect; a stolen old key deceives them until then",
            command("devices", *state_args(folder)),
        )
    if rotating:
        waits = f"{quantity(len(left), 'board')} without a certificate of the new one: {some(left)}" if left else ""
        yield note(
            "authority",
            f"the certificate authority is being replaced; {waits or 'all boards have certificates of the new one'}",
            "the old authority counts until that ends",
            "let these boards connect, or revoke them"
            if left
            else command("identity", "retire-ca", *state_args(folder)),
        )


def lock(site: Site) -> Iterator[Finding]:
    """Whether somebody keeps the lock that the running server needs for each change."""
    path = site.folder / FILE
    if not site.running or not path.is_file() or any(a.kind == "database-waits" for a in site.live.alerts):
        return  # the running server says it itself
    with translated(str(path)):
        holders = write_lock_holders(path, min(site.timeout, LOCK_S))
    if holders:
        yield wrong(
            "database-locked",
            f"{path} is locked by {' and '.join(holders)}",
            "the server waits with its next change, and answers no board meanwhile",
            "let that process go on, or end it; the server goes on by itself",
        )


def clock(site: Site) -> Iterator[Finding]:
    now, last_event = site.now, site.last_event
    ahead = last_event is not None and last_event > now + _AHEAD_S
    if now < _EARLIEST or ahead:
        said = f"; the job's last event was at {format_minute(last_event)}" if ahead and last_event is not None else ""
        yield wrong(
            "clock",
            f"this machine's clock says {format_minute(now)}{said}",
            "deadlines, certificates and what boards take for the time go by it",
            "set the clock: timedatectl set-ntp true",
        )


def crashes(site: Site) -> Iterator[Finding]:
    try:
        rows = read_logs(site.folder, most=5000)
    except FedpruneError as error:
        yield note("board-logs", str(error), "boards' logs and crash reports can't be shown", "Delete the file.")
        return
    found = [r for r in rows if r.kind == "crash" and site.now - r.received < _DAY_S]
    if found:
        names = sorted({r.device for r in found})
        last = found[-1]
        yield note(
            "crashes",
            f"{quantity(len(names), 'board')} crashed within a day ({', '.join(names[:MAX_NAMES_SHOWN])}), lastly "
            f"{last.device}: {last.text}",
            "a board that crashes trains nothing meanwhile",
            command("logs", "--device", last.device, *state_args(site.folder)),
        )


def backups(site: Site) -> Iterator[Finding]:
    found = last_backup(site.folder)
    if found is not None and site.now - found < _BACKUP_S:
        return
    said = "no backup was ever made" if found is None else f"the last backup is of {format_minute(found)}"
    yield note(
        "backup",
        f"{said} with `fedprune-server backup` from {site.folder}",
        "with the disk, the model and the identity of the fleet would be lost",
        command("backup", *state_args(site.folder), "--to", "PLACE"),
    )


def broker(site: Site) -> Iterator[Finding]:
    """Whether the broker is there, and accepts packets as large as are sent."""
    folder, server = site.folder, site.server
    if not site.cases and not server:
        return  # the settings, and with them the broker's address, couldn't be read
    if site.broker == EMBEDDED:
        if site.running:
            yield from _embedded(site)
        return
    shown_url = without_password(site.broker)
    with ExitStack() as stack:
        try:
            if (folder / IDENTITY).is_dir() and site.broker.startswith("mqtts://"):
                identity = stack.enter_context(IdentityFolder(folder, read_only=True))
                context = identity.context(site.ca)
                link = Link(site.broker, f"fedprune-{secrets.token_hex(12)}", tls=lambda: context)
                yield from _packets(link, site, shown_url, identity.site)
            else:
                link = Link(site.broker, f"fedprune-doctor-{secrets.token_hex(4)}")
                yield from _packets(link, site, shown_url, str(server.get("site", "default")))
        except FedpruneError as error:
            yield wrong(
                "broker",
                f"the broker at {shown_url} can't be used: {error}",
                "server and boards meet there; without it nothing moves",
                "see that it runs, that its address is right (--broker), and the firewall; docs/run-a-fleet.md",
            )


def standing_by(site: Site) -> Iterator[Finding]:
    """Whether the job is another server's for now."""
    if site.leader:
        waits = "one that stands by here continues it" if held(site.folder / LOCK) else "none waits here to continue it"
        yield note(
            "standby",
            f"a server elsewhere has the job: {site.leader}",
            f"when that one ends, {waits}",
            "look after the fleet there: its log, and its `fedprune-server doctor`",
        )


def other_servers(site: Site) -> Iterator[Finding]:
    """Other servers of this identity that serve the fleet."""
    folder, running = site.folder, site.running
    if site.broker == EMBEDDED or not (folder / IDENTITY).is_dir():
        return
    with (
        IdentityFolder(folder, read_only=True) as identity,
        leadership(site.broker, identity, site.ca, ServerInstance(folder, looks_only=True)) as asking,
    ):
        found = asking.others()
    place = socket.gethostname(), str(folder.resolve())
    here = [o for o in found if (o.host, o.folder) == place]
    if running:
        here = here[1:]  # one of them is this folder's server, whichever; the others run on copies of this disk
    elsewhere = [o for o in found if (o.host, o.folder) != place]
    for other in elsewhere + here:
        copied = "on a machine with a copy of this disk, " if other in here else ""
        yield wrong(
            "second-server",
            f"another server runs this fleet: {copied}{described(other)}",
            "one of the two will end: a fleet has one server" if running else "boards follow that one",
            "look after the fleet there; or, to serve it from here: "
            + command("run", *state_args(folder), "--take-over"),
        )


def revocations(site: Site) -> Iterator[Finding]:
    """Whether the broker was given the latest list of revoked certificates, where a command does that."""
    folder = site.folder
    crl = folder / IDENTITY / CRL
    if (folder / NOTE).exists() and crl.exists() and not delivered(folder, crl):
        yield wrong(
            "revocations",
            "the broker hasn't been given the latest list of revoked certificates",
            "it lets revoked boards connect; the server ignores them",
            "see why on_revocation fails in the server's log; a running server repeats it within 10 minutes",
        )


def _packets(link: Link, site: Site, url: str, name: str) -> Iterator[Finding]:
    size = int(site.server.get("max_packet", MAX_PACKET))
    topic = Topics(name).down_blob(f"doctor-{secrets.token_hex(4)}")  # without subscribers
    link.start(site.timeout)
    with link:
        link.publish(topic, bytes(max(1, size - PACKET_OVERHEAD)))
        through = link.flush(site.timeout) and link.connected
    if not through:
        yield wrong(
            "broker-packets",
            f"the broker at {url} doesn't take packets of {size} bytes",
            "models and updates travel in such packets, and the broker ends the connection of a client that sends them",
            "raise the broker's limit (docs/protocol.md), or set max_packet in [server] of this server's configuration",
        )


def _embedded(site: Site) -> Iterator[Finding]:
    folder, server = site.folder, site.server
    port = server.get("port") or (8883 if (folder / IDENTITY).is_dir() else 1883)
    host = str(server.get("host", LOCAL[0]))
    host = {"0.0.0.0": LOCAL[0], "::": LOCAL[2]}.get(host, host)  # noqa: S104  # nosec B104  # compared with, not listened on
    if server.get("port") == 0:
        return  # a free one, which only the running server knows
    try:
        socket.create_connection((host, int(port)), site.timeout).close()
    except OSError as error:
        yield wrong(
            "broker",
            f"the server's own broker doesn't answer at {host}:{port}: {error}",
            "boards can't reach the server",
            f"see the server's log; start it again: {command('run', *state_args(folder))}",
        )


def bucket(site: Site) -> Iterator[Finding]:
    url = str(site.server.get("blobs", IN_FOLDER))
    if url == IN_FOLDER:
        return
    try:
        within(site.timeout, lambda: next(Bucket(url).list(), None))
    except FedpruneError as error:
        yield wrong(
            "bucket",
            f"the bucket {url} can't be used: {error}",
            "rounds wait until it can, since that is where models and updates are",
            "see AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and the bucket's rights; docs/back-up.md#blobs-in-s3",
        )


CHECKS: tuple[Callable[[Site], Iterable[Finding]], ...] = (
    alerts,
    lock,
    clock,
    broker,
    standing_by,
    other_servers,
    revocations,
    rotation,
    bucket,
    crashes,
    backups,
)
"""The checks on a server; those on its jobs are in `job_checks`."""
