"""Checks a server's identity: which of its keys and certificates are missing or damaged, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fedprune.core.errors import FedpruneError, IdentityError
from fedprune.security.authority import AUTHORITY_CERTIFICATE_FILE, AUTHORITY_KEY_FILE, CRL_FILE, Authority
from fedprune.security.certificates import key_digest, load_certificate, load_tls_key
from fedprune.security.epoch_file import EpochFile
from fedprune.security.keys import SigningKey
from fedprune_server.enrollment.pki import IDENTITY_FOLDER, IdentityFolder
from fedprune_server.enrollment.store import REVOKED
from fedprune_server.maintenance.finding import Finding, Severity

_RESTORE_ADVICE = "Restore the backup of the identity folder."
_NEXT_START_ADVICE = "The next start of the server makes a new one."
_REWRITE_ADVICE = "`fedprune-server devices list` writes it again, from the database; then let the broker load it."
# The files of an identity, and the remedy for each if it is missing: some the server makes again, others nobody can.
_REMEDIES = {
    "site": "Write the site's name into it, or restore a backup of it.",
    AUTHORITY_KEY_FILE: _RESTORE_ADVICE,
    AUTHORITY_CERTIFICATE_FILE: _RESTORE_ADVICE,
    CRL_FILE: _REWRITE_ADVICE,
    "signing.key": _RESTORE_ADVICE,
    "epoch": "Restore a backup of it; without one check this machine's clock: the next start continues from the time.",
    "server.key": _NEXT_START_ADVICE,
    "server.pem": _NEXT_START_ADVICE,
}


def check_identity(identity: Path) -> Iterator[Finding]:
    """Check the files of an identity folder. Its members are in the database, which `state_check` reads."""
    missing = {name for name in _REMEDIES if not (identity / name).exists()}
    for name, advice in _REMEDIES.items():
        if name in missing:
            yield Finding(Severity.WRONG, f"{identity / name} is missing", advice)
    # Each of the following loads what it names, so that it reports more than the missing file only if all is there.
    if not missing & {AUTHORITY_KEY_FILE, AUTHORITY_CERTIFICATE_FILE}:
        yield from _failure_finding(lambda: Authority(identity))
    if not missing & {"site", AUTHORITY_KEY_FILE, AUTHORITY_CERTIFICATE_FILE, CRL_FILE, "signing.key"}:
        yield from _failure_finding(lambda: _check_revocation_list(identity.parent))
    if "signing.key" not in missing:
        yield from _failure_finding(lambda: SigningKey.load(identity / "signing.key"))
    yield from _failure_finding(lambda: EpochFile(identity / "epoch"))
    if not missing & {"server.key", "server.pem"}:
        yield from _failure_finding(lambda: _check_server_certificate(identity))


def find_revoked_devices(folder: Path) -> frozenset[str]:
    """Revoked devices that have no other key."""
    if not (folder / IDENTITY_FOLDER).is_dir():
        return frozenset()
    with IdentityFolder(folder, read_only=True) as identity:
        devices = identity.store.devices()
    return frozenset(d.device for d in devices) - {d.device for d in devices if d.status != REVOKED}


def _failure_finding(read: Callable[[], object]) -> Iterator[Finding]:
    try:
        read()
    except FedpruneError as error:
        yield Finding(Severity.WRONG, str(error))


def _check_revocation_list(state: Path) -> None:
    try:
        with IdentityFolder(state, read_only=True) as identity:
            path, store = identity.authority.crl_path, identity.store
            # Beside other servers of a database, the list on this machine is written when its server runs.
            is_current = store.shared or identity.authority.is_list_current(store.revoked_certificates())
    except FedpruneError:
        return  # a file that can't be read is a finding of its own
    if not is_current:
        raise IdentityError(f"{path} is damaged, or not what the database says", hint=_REWRITE_ADVICE)


def _check_server_certificate(identity: Path) -> None:
    key, certificate = identity / "server.key", identity / "server.pem"
    certified_key = load_certificate(certificate, "the server's certificate").public_key()
    if key_digest(certified_key) != key_digest(load_tls_key(key).public_key()):
        raise IdentityError(f"{key} and {certificate} don't belong together", hint=_NEXT_START_ADVICE)
