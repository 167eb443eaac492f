"""Reads facts for the alert rules from a state folder: free disk space, certificates, waiting boards, the rollout."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cryptography import x509

from fedprune.core.errors import FedpruneError, StorageError, error_reason
from fedprune.releases.rollout import Fate
from fedprune.security.certificates import load_certificate, seconds_of
from fedprune.security.keys import VerifyingKey
from fedprune_server.config.alert_settings import OFF
from fedprune_server.enrollment.pki import CONSOLE_CERTIFICATE, hosts_of
from fedprune_server.enrollment.pki import IDENTITY_FOLDER as IDENTITY
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.monitoring.alerts import server_command
from fedprune_server.monitoring.situation import CertificateDates, RolloutStatus, SiteFacts
from fedprune_server.ota.rollouts import boards_with_release
from fedprune_server.ota.store import RolloutStore
from fedprune_server.storage.folder_layout import has_database
from fedprune_server.storage.open_database import open_database

_CERTIFICATES = ("authority.pem", "server.pem", "broker.pem", "web.pem")

_NO_FACTS = SiteFacts()


def site_facts(
    folder: Path, server: Mapping[str, Any], *, members: bool = True, earlier: SiteFacts | None = _NO_FACTS
) -> SiteFacts:
    """Facts of a state folder.

    Args:
        server: Settings of the table [server].
        members: Whether the identity can be read.
        earlier: Facts that replace those of a database that can't be read now; with None that raises `StorageError`.
    """
    disk = shutil.disk_usage(folder)
    waiting, unannounced = _member_facts(folder, earlier) if members else ({}, {})
    certificates = (*_certificates(folder), *_console_certificate(folder, server))
    return SiteFacts((disk.free, disk.total), certificates, waiting, _rollout_status(folder, earlier), unannounced)


def _certificates(folder: Path) -> Iterator[CertificateDates]:
    for name in _CERTIFICATES:
        path = folder / IDENTITY / name
        if not path.is_file():
            continue
        todo = f"start the server again, which makes a new one: {server_command(folder, 'run')}"
        try:
            certificate = load_certificate(path, "certificate")
            if name.startswith("authority"):
                todo = "let all boards join again, after " + server_command(folder, "identity", "replace")
                todo += " (docs/runbook.md#the-servers-keys-are-stolen)"
            yield _certificate_dates(path, certificate, todo)
        except FedpruneError as error:
            yield CertificateDates(str(path), 0, 0, "restore a backup of the identity (docs/back-up.md)", str(error))


def _console_certificate(folder: Path, server: Mapping[str, Any]) -> Iterator[CertificateDates]:
    """The console's own certificate; a server doesn't start with an expired one."""
    path = server.get("console_certificate")
    if not path or server.get("console", OFF) == OFF:
        return
    todo = "put a new one and its key there (console_certificate, console_key), and start the server again"
    try:  # a chain may follow the certificate
        certificate = x509.load_pem_x509_certificate(Path(path).read_bytes())
        if Path(path).resolve() == (folder / IDENTITY / CONSOLE_CERTIFICATE).resolve():
            hosts = (word for host in sorted(hosts_of(certificate)) for word in ("--host", host))
            command_line = server_command(folder, "identity", "certificate", *hosts)
            todo = f"start the server again once this has issued a new one: {command_line}"
        yield _certificate_dates(Path(path), certificate, todo)
    except (OSError, ValueError) as error:
        yield CertificateDates(str(path), 0, 0, todo, f"{path}: {error_reason(error)}")


def _certificate_dates(path: Path, certificate: x509.Certificate, todo: str) -> CertificateDates:
    begins, ends = seconds_of(certificate.not_valid_before_utc), seconds_of(certificate.not_valid_after_utc)
    return CertificateDates(str(path), begins, ends, todo)


def _member_facts(folder: Path, earlier: SiteFacts | None) -> tuple[Mapping[str, str], Mapping[str, float]]:
    """The keys that wait for approval, and the members that have never announced themselves."""
    if not (folder / IDENTITY).is_dir() or not has_database(folder):
        return {}, {}
    try:
        with open_database(folder, read_only=True) as database:
            store = IdentityStore(database)
            waiting, unannounced = store.waiting(), store.unannounced_members()
    except StorageError:  # the server reports its database itself, and the other facts count all the same
        if earlier is None:
            raise
        return earlier.waiting_keys, earlier.unannounced_boards
    return {device: VerifyingKey.from_hex(key).fingerprint for device, key in waiting}, unannounced


def _rollout_status(folder: Path, earlier: SiteFacts | None) -> RolloutStatus | None:
    if not has_database(folder):
        return None
    try:
        with RolloutStore(folder, read_only=True) as store:
            entry = store.latest_entry()
    except StorageError:  # the server reports its database itself, and the other facts count all the same
        if earlier is None:
            raise
        return earlier.rollout
    if entry is None:
        return None
    rollout, boards = entry.rollout, entry.rollout.boards
    report_times = [float(r["at"]) for r in entry.reports.values() if isinstance(r.get("at"), (int, float))]
    return RolloutStatus(
        entry.offer.number,
        rollout.phase,
        rollout.why,
        sorted(n for n, b in boards.items() if b.fate is Fate.FAILED),
        sorted(n for n, b in boards.items() if b.fate in (Fate.WAITING, Fate.GIVEN)),
        sorted(boards_with_release([entry], entry.offer.number)),
        max([entry.started_at, *report_times]),
    )
