"""What is wrong around a job: who may take part, certificates, clock, disk, broker, bucket, rollouts, backups."""

from __future__ import annotations

import os
import queue
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509

from fedprune.coordination.rollout import Fate, RolloutPhase
from fedprune.errors import FedpruneError, reason
from fedprune.quantity import quantity
from fedprune.trust.certificates import load_certificate, seconds_of
from fedprune.trust.keys import VerifyingKey
from fedprune.wire.chunk import MAX_PACKET, PACKET_OVERHEAD
from fedprune.wire.link import Link
from fedprune.wire.topics import Topics
from fedprune_server.bucket.bucket import FOLDER as IN_FOLDER
from fedprune_server.bucket.bucket import Bucket
from fedprune_server.fleet.board_logs import read_logs
from fedprune_server.fleet.quarantine import read_rows
from fedprune_server.identity.folder import FOLDER as IDENTITY
from fedprune_server.identity.folder import IdentityFolder
from fedprune_server.identity.store import REVOKED, WAITING
from fedprune_server.observation.ailment import Ailment, at, command, note, of_finding, wrong
from fedprune_server.rollouts.store import FILE as ROLLOUTS
from fedprune_server.rollouts.store import FOLDER as RELEASES
from fedprune_server.rollouts.store import RolloutStore
from fedprune_server.settings.config import EMBEDDED, LOCAL, OFF, without_password
from fedprune_server.store.backup_record import last_backup
from fedprune_server.store.identity_checkup import check_identity

_DAY_S = 24 * 3600.0
_EXPIRES_S = 30 * _DAY_S
_BACKUP_S = 7 * _DAY_S
_STUCK_S = 6 * 3600.0
_AHEAD_S = 120.0
_FULL, _NEARLY = 0.03, 0.1
_FULL_BYTES = 256 * 2**20
_SHOWN = 5
_EARLIEST = 1_750_000_000
"""No clock that is right shows an earlier time, in seconds since 1970."""

_T = TypeVar("_T")


class TooSlowError(FedpruneError):
    """Something didn't answer in time."""


def within(seconds: float, work: Callable[[], _T]) -> _T:
    """What `work` gives, if it does so in time; else it is left alone.

    Raises:
        TooSlowError: It took longer.
        Exception: Whatever it raised.
    """
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


def revoked(folder: Path) -> frozenset[str]:
    """Devices that were shut out, and have no other key; none where the identity can't be read."""
    identity = folder / IDENTITY
    if not identity.is_dir() or any(check_identity(identity)):
        return frozenset()
    with IdentityFolder(folder, read_only=True) as opened:
        devices = opened.store.devices()
    return frozenset(d.device for d in devices if d.status == REVOKED) - {
        d.device for d in devices if d.status != REVOKED
    }


def members(folder: Path, now: float) -> Iterator[Ailment]:
    """Who waits to be let in, what the identity lacks, and which certificates end soon."""
    identity = folder / IDENTITY
    if not identity.is_dir():
        return
    broken = list(check_identity(identity))
    for finding in broken:
        yield of_finding(finding, "identity", "without it the server can't prove to boards who it is")
    for name in ("authority.pem", "server.pem", "broker.pem", "web.pem"):
        path = identity / name
        if path.is_file():
            todo = f"start the server again, which makes a new one: {command('run', *at(folder))}"
            if name.startswith("authority"):
                todo = "begin an identity anew, and let every board join it (docs/security.md)"
            yield from _certificate(path, now, todo)
    if broken:
        return
    with IdentityFolder(folder, read_only=True) as opened:
        waiting = [d for d in opened.store.devices() if d.status == WAITING]
    if waiting:
        first = waiting[0]
        fingerprint = VerifyingKey.from_hex(first.key).fingerprint
        names = sorted({d.device for d in waiting})
        yield wrong(
            "devices-wait",
            f"{quantity(len(names), 'device')} waits for your word: {', '.join(names[:_SHOWN])}"
            if len(names) == 1
            else f"{len(names)} devices wait for your word: {', '.join(names[:_SHOWN])}",
            "until then nobody hears them",
            "compare the key with what the board shows, then "
            + command("devices", "approve", first.device, "--key", fingerprint, *at(folder)),
        )


def console(server: Mapping[str, Any], now: float) -> Iterator[Ailment]:
    """Whether browsers will go on to take the console's certificate; a server doesn't start with one that has ended."""
    path = server.get("console_certificate")
    if not path or server.get("console", OFF) == OFF:
        return
    todo = "put a new one and its key there (console_certificate, console_key), and start the server again"
    try:
        certificate = x509.load_pem_x509_certificate(Path(path).read_bytes())  # with a chain as long as it may be
    except (OSError, ValueError) as error:
        yield wrong("certificate", f"{path}: {reason(error)}", "the server doesn't start with it", todo)
        return
    yield from _ends(path, certificate, now, todo)


def _certificate(path: Path, now: float, todo: str) -> Iterator[Ailment]:
    try:
        certificate = load_certificate(path, "certificate")
    except FedpruneError as error:
        yield wrong("certificate", str(error), "nobody can connect with it", "Restore a backup of the identity.")
        return
    yield from _ends(path, certificate, now, todo)


def _ends(path: object, certificate: x509.Certificate, now: float, todo: str) -> Iterator[Ailment]:
    begins, ends = seconds_of(certificate.not_valid_before_utc), seconds_of(certificate.not_valid_after_utc)
    if begins > now:
        yield wrong("certificate", f"{path} counts from {_day(begins)} only", "who checks it refuses to connect", todo)
        return
    left = ends - now
    if left > _EXPIRES_S:
        return
    if left <= 0:
        yield wrong("certificate", f"{path} ended on {_day(ends)}", "who checks it refuses to connect", todo)
    else:
        yield note("certificate", f"{path} ends on {_day(ends)}", "then who checks it refuses to connect", todo)


def clock(now: float, last_event: float | None) -> Iterator[Ailment]:
    """Whether this machine's clock can be right."""
    ahead = last_event is not None and last_event > now + _AHEAD_S
    if now < _EARLIEST or ahead:
        said = f"; the job's last event was at {_day(last_event)}" if ahead and last_event is not None else ""
        yield wrong(
            "clock",
            f"this machine's clock says {_day(now)}{said}",
            "deadlines, certificates and what boards take for the time go by it",
            "set the clock: timedatectl set-ntp true",
        )


def disk(folder: Path, usage: Callable[[Path], Any] = shutil.disk_usage) -> Iterator[Ailment]:
    """Whether there is room for what comes."""
    found = usage(folder)
    share = found.free / max(1, found.total)
    if share > _NEARLY and found.free > _FULL_BYTES:
        return
    full = share < _FULL or found.free < _FULL_BYTES
    yield (wrong if full else note)(
        "disk",
        f"the disk of {folder} has {found.free / 1e9:.2f} of {found.total / 1e9:.0f} GB left",
        "a server without room ends (exit code 30); nothing is lost, but nothing goes on",
        f"make room; {command('check', *at(folder), '--repair')} deletes what the job needs no more, and a smaller "
        "--keep keeps fewer models",
    )


def quarantined(folder: Path, now: float, *, running: bool) -> Iterator[Ailment]:
    """Who isn't listened to."""
    held = {n: r for n, r in read_rows(folder).items() if r["until"] is not None and r["until"] > now}
    if not held or not running:
        return
    name, row = next(iter(sorted(held.items())))
    yield wrong(
        "quarantine",
        f"{quantity(len(held), 'device')} in quarantine: {', '.join(sorted(held)[:_SHOWN])}; {name}: {row['reason']}",
        "what they send is dropped unread",
        f"see {command('logs', '--device', name, *at(folder))} and the board's own log; it ends by itself, and a board "
        f"that isn't yours is shut out by {command('devices', 'revoke', name, *at(folder))}",
    )


def crashes(folder: Path, now: float) -> Iterator[Ailment]:
    """Boards that crashed within a day."""
    try:
        found = [r for r in read_logs(folder, most=5000) if r.kind == "crash" and now - r.received < _DAY_S]
    except FedpruneError as error:
        yield note("board-logs", str(error), "what boards told of themselves can't be read", "Delete the file.")
        return
    if found:
        names = sorted({r.device for r in found})
        last = found[-1]
        yield note(
            "crashes",
            f"{quantity(len(names), 'board')} crashed within a day ({', '.join(names[:_SHOWN])}), lastly "
            f"{last.device}: {last.text}",
            "a board that crashes trains nothing meanwhile",
            command("logs", "--device", last.device, *at(folder)),
        )


def rollouts(folder: Path, now: float) -> Iterator[Ailment]:
    """A rollout that doesn't go on."""
    if not (folder / RELEASES / ROLLOUTS).is_file() or not os.access(folder / RELEASES / ROLLOUTS, os.W_OK):
        return
    with RolloutStore(folder) as store:
        entry = store.latest()
    if entry is None:
        return
    todo = command("rollout", "status", *at(folder))
    fates = entry.rollout.boards
    failed = sorted(n for n, b in fates.items() if b.fate is Fate.FAILED)
    if entry.rollout.phase is RolloutPhase.STOPPED and failed:
        yield note(
            "rollout",
            f"the rollout of release {entry.offer.number} was stopped; it failed on {', '.join(failed[:_SHOWN])}",
            "boards have different releases",
            f"{todo}; then mend the release and roll out a new one",
        )
    if entry.rollout.phase is RolloutPhase.PAUSED:
        yield note(
            "rollout",
            f"the rollout of release {entry.offer.number} is {entry.rollout.why}",
            "no further board is given it",
            f"to go on: {command('rollout', 'resume', *at(folder))}",
        )
    if entry.rollout.phase is not RolloutPhase.RUNNING:
        return
    told = [float(r["at"]) for r in entry.reports.values() if isinstance(r.get("at"), (int, float))]
    since = now - max([entry.at, *told])
    if since > _STUCK_S:
        left = sorted(n for n, b in fates.items() if b.fate in (Fate.WAITING, Fate.GIVEN))
        yield wrong(
            "rollout",
            f"the rollout of release {entry.offer.number} has heard of no board for {since / 3600:.0f} h; "
            f"it waits for {', '.join(left[:_SHOWN]) or 'boards'}",
            "the next stage begins when enough boards of this one are well",
            f"{todo}; start the boards that are off, or end it: {command('rollout', 'stop', *at(folder))}",
        )


def backups(folder: Path, now: float) -> Iterator[Ailment]:
    """How old the last backup is, as far as this folder knows."""
    found = last_backup(folder)
    if found is not None and now - found < _BACKUP_S:
        return
    said = "no backup was ever made" if found is None else f"the last backup is of {_day(found)}"
    yield note(
        "backup",
        f"{said} with `fedprune-server backup` from {folder}",
        "with the disk, the model and the identity of the fleet would be lost",
        command("backup", *at(folder), "--to", "PLACE"),
    )


def broker(folder: Path, server: Mapping[str, Any], timeout: float, *, running: bool) -> Iterator[Ailment]:
    """Whether the broker is there, and takes packets as large as are sent.

    Args:
        folder: The state folder, with the identity.
        server: The server's settings.
        timeout: Seconds for each step.
        running: Whether a server runs, and with it the embedded broker.
    """
    url = str(server.get("broker", EMBEDDED))
    if url == EMBEDDED:
        if running:
            yield from _embedded(folder, server, timeout)
        return
    shown_url = without_password(url)
    identity: IdentityFolder | None = None
    try:
        ca = Path(server["ca"]) if server.get("ca") else None
        if (folder / IDENTITY).is_dir() and url.startswith("mqtts://"):
            identity = IdentityFolder(folder, read_only=True)
            context = identity.context(ca)
            link = Link(url, f"fedprune-{secrets.token_hex(12)}", tls=lambda: context)
        else:
            link = Link(url, f"fedprune-doctor-{secrets.token_hex(4)}")
        yield from _packets(link, folder, server, timeout, shown_url, identity)
    except FedpruneError as error:
        yield wrong(
            "broker",
            f"the broker at {shown_url} can't be used: {error}",
            "server and boards meet there; without it nothing moves",
            "see that it runs, that its address is right (--broker), and the firewall; docs/run-a-fleet.md",
        )
    finally:
        if identity is not None:
            identity.close()


def _packets(
    link: Link, folder: Path, server: Mapping[str, Any], timeout: float, url: str, identity: IdentityFolder | None
) -> Iterator[Ailment]:
    site = str(server.get("site", "default")) if identity is None else identity.site
    size = int(server.get("max_packet", MAX_PACKET))
    topic = Topics(site).down_blob(f"doctor-{secrets.token_hex(4)}")  # nobody listens there
    link.start(timeout)
    try:
        link.publish(topic, bytes(max(1, size - PACKET_OVERHEAD)))
        through = link.flush(timeout) and link.connected
    finally:
        link.close()
    if not through:
        yield wrong(
            "broker-packets",
            f"the broker at {url} doesn't take packets of {size} bytes",
            "models and updates travel in such packets, and the broker ends the connection of who sends them",
            f"raise the broker's limit (docs/protocol.md), or set max_packet in [server] of {folder}'s configuration",
        )


def _embedded(folder: Path, server: Mapping[str, Any], timeout: float) -> Iterator[Ailment]:
    port = server.get("port") or (8883 if (folder / IDENTITY).is_dir() else 1883)
    host = str(server.get("host", LOCAL[0]))
    host = {"0.0.0.0": LOCAL[0], "::": LOCAL[2]}.get(host, host)  # noqa: S104  # nosec B104  # compared with, not listened on
    if server.get("port") == 0:
        return  # a free one, which only the running server knows
    try:
        socket.create_connection((host, int(port)), timeout).close()
    except OSError as error:
        yield wrong(
            "broker",
            f"the server's own broker doesn't answer at {host}:{port}: {error}",
            "boards can't reach the server",
            f"see the server's log; start it again: {command('run', *at(folder))}",
        )


def bucket(server: Mapping[str, Any], timeout: float) -> Iterator[Ailment]:
    """Whether the bucket of the job's blobs can be used."""
    url = str(server.get("blobs", IN_FOLDER))
    if url == IN_FOLDER:
        return
    try:
        within(timeout, lambda: next(Bucket(url).list(), None))
    except FedpruneError as error:
        yield wrong(
            "bucket",
            f"the bucket {url} can't be used: {error}",
            "rounds wait until it can, since that is where models and updates are",
            "see AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and the bucket's rights; docs/back-up.md#blobs-in-s3",
        )


def _day(at_: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_))
