"""Checks of `doctor` on what a server is connected to: the broker, other servers of the fleet, and the bucket."""

from __future__ import annotations

import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedprune.core.errors import FedpruneError
from fedprune.security.authority import CRL_FILE
from fedprune.wire.chunk import DEFAULT_MAX_PACKET, PACKET_OVERHEAD_BYTES
from fedprune.wire.link import BrokerLink
from fedprune.wire.topics import Topics
from fedprune_server.config.network_settings import EMBEDDED, LOOPBACK_HOSTS, without_password
from fedprune_server.enrollment.pki import IDENTITY_FOLDER as IDENTITY
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.maintenance.finding import Finding, unknown_finding, wrong_finding
from fedprune_server.maintenance.stored_job import StoredJob
from fedprune_server.messaging.broker.revocations import NOTE_FILE, is_list_delivered
from fedprune_server.messaging.second_server import ServerInstance, second_server_guard, server_text
from fedprune_server.monitoring.alerts import server_command
from fedprune_server.monitoring.monitor_record import MonitorRecord
from fedprune_server.storage.s3.bucket import IN_FOLDER, Bucket

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


def check_broker(site: CheckedSite) -> Iterator[Finding]:
    """Whether the broker answers, and accepts packets as large as are sent."""
    folder, settings = site.folder, site.settings
    if not settings and not any(job.settings for job in site.jobs):
        return  # the settings, and with them the broker's address: unreadable, or not stored yet by a first start
    if site.broker == EMBEDDED:
        if site.is_running:
            yield from _check_embedded_broker(site)
        return
    shown_url = without_password(site.broker)
    try:
        if (folder / IDENTITY).is_dir() and site.broker.startswith("mqtts://"):
            with IdentityFolder(folder, read_only=True) as identity:
                context = identity.tls_context(site.ca)
                link = BrokerLink(site.broker, f"fedprune-{secrets.token_hex(12)}", tls=lambda: context)
                yield from _check_packets(link, site, shown_url, identity.site)
        else:
            link = BrokerLink(site.broker, f"fedprune-doctor-{secrets.token_hex(4)}")
            yield from _check_packets(link, site, shown_url, str(settings.get("site", "default")))
    except FedpruneError as error:
        yield wrong_finding(
            "broker",
            f"the broker at {shown_url} can't be used: {error}",
            "server and boards meet there; without it nothing moves",
            "see that it runs, that its address is right (--broker), and the firewall; docs/run-a-fleet.md",
        )


def check_other_servers(site: CheckedSite) -> Iterator[Finding]:
    """Find other servers that serve this fleet with the same identity."""
    folder, running = site.folder, site.is_running
    if site.broker == EMBEDDED or not (folder / IDENTITY).is_dir():
        return
    with (
        IdentityFolder(folder, read_only=True) as identity,
        second_server_guard(site.broker, identity, site.ca, ServerInstance(folder, only_looks=True)) as guard,
    ):
        servers = guard.others()
    own_place = socket.gethostname(), str(folder.resolve())
    same_place = [o for o in servers if (o.host, o.folder) == own_place]
    if running:  # one of them is this folder's server, whichever; the others run on copies of this disk
        same_place = same_place[1:]
    elsewhere = [o for o in servers if (o.host, o.folder) != own_place]
    for other in elsewhere + same_place:
        copied = "on a machine with a copy of this disk, " if other in same_place else ""
        yield wrong_finding(
            "second-server",
            f"another server runs this fleet: {copied}{server_text(other)}",
            "both answer the boards, and a fleet has one server" if running else "boards follow that one",
            "stop one of the two" if running else "look after the fleet there; or stop that one, to serve it from here",
        )


def check_revocations(site: CheckedSite) -> Iterator[Finding]:
    """Whether the broker was given the latest list of revoked certificates, where a command does that."""
    folder = site.folder
    crl = folder / IDENTITY / CRL_FILE
    if (folder / NOTE_FILE).exists() and crl.exists() and not is_list_delivered(folder, crl):
        yield wrong_finding(
            "revocations",
            "the broker hasn't been given the latest list of revoked certificates",
            "it lets revoked boards connect; the server ignores them",
            "see why on_revocation fails in the server's log; a running server repeats it within 10 minutes",
        )


def _check_packets(link: BrokerLink, site: CheckedSite, url: str, name: str) -> Iterator[Finding]:
    size = int(site.settings.get("max_packet", DEFAULT_MAX_PACKET))
    topic = Topics(name).down_blob(f"doctor-{secrets.token_hex(4)}")  # without subscribers
    # Brokers refuse a packet that is too large in two ways: they end the connection, or drop it unacknowledged.
    link.start(site.timeout_s)
    with link:
        link.publish(topic, bytes(max(1, size - PACKET_OVERHEAD_BYTES)))
        is_delivered = link.flush(site.timeout_s) and link.connected
    if not is_delivered:
        yield wrong_finding(
            "broker-packets",
            f"the broker at {url} doesn't take packets of {size} bytes",
            "models and updates travel in such packets, and the broker ends the connection of a client that sends them",
            "raise the broker's limit (docs/protocol.md), or set max_packet in [server] of this server's configuration",
        )


def _check_embedded_broker(site: CheckedSite) -> Iterator[Finding]:
    folder, settings = site.folder, site.settings
    port = settings.get("port") or (8883 if (folder / IDENTITY).is_dir() else 1883)
    host = str(settings.get("host", LOOPBACK_HOSTS[0]))
    host = {"0.0.0.0": LOOPBACK_HOSTS[0], "::": LOOPBACK_HOSTS[2]}.get(host, host)  # noqa: S104  # nosec B104  # compared with, not listened on
    if settings.get("port") == 0:
        return  # a free one, which only the running server knows
    try:
        socket.create_connection((host, int(port)), site.timeout_s).close()
    except OSError as error:
        yield wrong_finding(
            "broker",
            f"the server's own broker doesn't answer at {host}:{port}: {error}",
            "boards can't reach the server",
            f"see the server's log; start it again: {server_command(folder, 'run')}",
        )


def check_bucket(site: CheckedSite) -> Iterator[Finding]:
    url = str(site.settings.get("blobs", IN_FOLDER))
    if url == IN_FOLDER:
        return
    try:
        run_within(site.timeout_s, lambda: next(Bucket(url).list(), None))
    except FedpruneError as error:
        make, problem = wrong_finding, "can't be used"
        if isinstance(error, TooSlowError):
            make, problem = unknown_finding, "was not read"
        yield make(
            "bucket",
            f"the bucket {url} {problem}: {error}",
            "rounds wait until it can, since that is where models and updates are",
            "see AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and the bucket's rights; docs/back-up.md#blobs-in-s3",
        )
