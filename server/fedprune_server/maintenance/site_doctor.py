"""What is wrong around a job: identity, clock, broker, bucket, crashes, backups; the alert rules find the rest."""

from __future__ import annotations

import queue
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fedprune.core.errors import FedpruneError
from fedprune.core.text import quantity, some
from fedprune.security.authority import CRL
from fedprune.wire.chunk import MAX_PACKET, PACKET_OVERHEAD
from fedprune.wire.mqtt.link import Link
from fedprune.wire.topics import Topics
from fedprune_server.config.server_config import EMBEDDED, LOCAL, without_password
from fedprune_server.devices.board_logs import read_logs
from fedprune_server.enrollment.pki import FOLDER as IDENTITY
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import REVOKED
from fedprune_server.maintenance.backup_record import last_backup
from fedprune_server.maintenance.finding import Finding, note, wrong
from fedprune_server.maintenance.identity_check import check_identity
from fedprune_server.messaging.broker.revocations import NOTE, delivered
from fedprune_server.messaging.leadership import described, leadership
from fedprune_server.monitoring.alerts import SHOWN, at, command, day
from fedprune_server.storage.s3.bucket import FOLDER as IN_FOLDER
from fedprune_server.storage.s3.bucket import Bucket

_DAY_S = 24 * 3600.0
_BACKUP_S = 7 * _DAY_S
_AHEAD_S = 120.0
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


def identity(folder: Path) -> Iterator[Finding]:
    """What the identity lacks."""
    if (folder / IDENTITY).is_dir():
        for finding in check_identity(folder / IDENTITY):
            advice = finding.advice or "See docs/back-up.md#check."
            why = "without it the server can't prove to boards who it is"
            yield replace(finding, kind="identity", why=why, advice=advice)


def rotation(folder: Path) -> Iterator[Finding]:
    """Boards that don't know the server's present keys, and a replacement of the authority that can end.

    Args:
        folder: The state folder, with a whole identity.
    """
    if not (folder / IDENTITY).is_dir():
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
            + command("devices", "replace", "NAME", *at(folder)),
        )
    if names := [name for name, key in behind.items() if key in chain]:
        yield note(
            "signing-key",
            f"{quantity(len(names), 'board')} last connected before the signing key was replaced: {some(names)}",
            "they follow when they connect; a stolen old key deceives them until then",
            command("devices", *at(folder)),
        )
    if rotating:
        waits = f"{quantity(len(left), 'board')} without a certificate of the new one: {some(left)}" if left else ""
        yield note(
            "authority",
            f"the certificate authority is being replaced; {waits or 'all boards have certificates of the new one'}",
            "the old authority counts until that ends",
            "let these boards connect, or revoke them" if left else command("identity", "retire-ca", *at(folder)),
        )


def clock(now: float, last_event: float | None) -> Iterator[Finding]:
    """Whether this machine's clock can be right."""
    ahead = last_event is not None and last_event > now + _AHEAD_S
    if now < _EARLIEST or ahead:
        said = f"; the job's last event was at {day(last_event)}" if ahead and last_event is not None else ""
        yield wrong(
            "clock",
            f"this machine's clock says {day(now)}{said}",
            "deadlines, certificates and what boards take for the time go by it",
            "set the clock: timedatectl set-ntp true",
        )


def crashes(folder: Path, now: float) -> Iterator[Finding]:
    """Boards that crashed within a day."""
    try:
        found = [r for r in read_logs(folder, most=5000) if r.kind == "crash" and now - r.received < _DAY_S]
    except FedpruneError as error:
        yield note("board-logs", str(error), "boards' logs and crash reports can't be shown", "Delete the file.")
        return
    if found:
        names = sorted({r.device for r in found})
        last = found[-1]
        yield note(
            "crashes",
            f"{quantity(len(names), 'board')} crashed within a day ({', '.join(names[:SHOWN])}), lastly "
            f"{last.device}: {last.text}",
            "a board that crashes trains nothing meanwhile",
            command("logs", "--device", last.device, *at(folder)),
        )


def backups(folder: Path, now: float) -> Iterator[Finding]:
    """How old the last backup is, as far as this folder knows."""
    found = last_backup(folder)
    if found is not None and now - found < _BACKUP_S:
        return
    said = "no backup was ever made" if found is None else f"the last backup is of {day(found)}"
    yield note(
        "backup",
        f"{said} with `fedprune-server backup` from {folder}",
        "with the disk, the model and the identity of the fleet would be lost",
        command("backup", *at(folder), "--to", "PLACE"),
    )


def broker(folder: Path, server: Mapping[str, Any], timeout: float, *, running: bool) -> Iterator[Finding]:
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


def other_servers(folder: Path, server: Mapping[str, Any], *, running: bool) -> Iterator[Finding]:
    """Whether another server of this identity serves the fleet.

    Args:
        folder: The state folder, with the identity.
        server: The server's settings.
        running: Whether a server runs on the folder.
    """
    url = str(server.get("broker", EMBEDDED))
    if url == EMBEDDED or not (folder / IDENTITY).is_dir():
        return
    ca = Path(server["ca"]) if server.get("ca") else None
    with (
        IdentityFolder(folder, read_only=True) as identity,
        leadership(url, identity, folder, ca, looks_only=True) as asking,
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
            f"look after the fleet there; or, to serve it from here: {command('run', *at(folder), '--take-over')}",
        )


def revocations(folder: Path) -> Iterator[Finding]:
    """Whether the broker was given the latest list of revoked certificates, where a command does that."""
    crl = folder / IDENTITY / CRL
    if (folder / NOTE).exists() and crl.exists() and not delivered(folder, crl):
        yield wrong(
            "revocations",
            "the broker hasn't been given the latest list of revoked certificates",
            "it lets revoked boards connect; the server ignores them",
            "see why on_revocation fails in the server's log; a running server repeats it within 10 minutes",
        )


def _packets(
    link: Link, folder: Path, server: Mapping[str, Any], timeout: float, url: str, identity: IdentityFolder | None
) -> Iterator[Finding]:
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


def _embedded(folder: Path, server: Mapping[str, Any], timeout: float) -> Iterator[Finding]:
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


def bucket(server: Mapping[str, Any], timeout: float) -> Iterator[Finding]:
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
