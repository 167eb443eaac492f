"""The operator's command that brings a changed list of revoked certificates to the broker.

Each revocation, by `fedprune-server devices`, in the console or by a start that completes a lost one, changes
`crl.pem`. The running server notices it and runs the command until it succeeds, with growing pauses. A note in the
state folder holds the digest of the list for which it succeeded, so that the next start delivers revocations made while
no server ran.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import subprocess  # nosec B404  # the operator's own command, never a shell
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import storage_errors
from fedprune.core.errors import BrokerError, StorageError, error_reason
from fedprune_server.config.alert_settings import OFF

log = logging.getLogger("fedprune.server")

# Environment variable that holds the list's path, for the command.
CRL_VARIABLE = "FEDPRUNE_CRL"

# File of the state folder, if there is a command: sha256 of the list for which it succeeded last, if ever.
NOTE_FILE = "revocations-given"

POLL_S = 1.0

# Seconds to the next attempt after a first failure, which double with each further one, and their maximum.
FIRST_RETRY_S, MAX_RETRY_S = 30.0, 600.0

COMMAND_TIMEOUT_S = 60.0
_MAX_SHOWN_OUTPUT = 500


class RevocationCommandError(BrokerError):
    """The command failed."""


def is_list_delivered(folder: Path, crl: Path) -> bool:
    """Whether the command has succeeded for the present list. Raises `StorageError` if a file can't be read."""
    with storage_errors(f"can't read {folder / NOTE_FILE}"):
        note = folder / NOTE_FILE
        return note.exists() and note.read_text(errors="replace").strip() == _list_digest(crl)


def deliver_list(command: str, folder: Path, crl: Path) -> None:
    """Run the command for the present list, and note that it succeeded. Its words are quoted as for a shell, which runs
    none of it. Raises `RevocationCommandError` if it can't be started, fails, or takes too long, and `StorageError` if
    the list can't be read or the note not be written."""
    digest = _list_digest(crl)
    try:
        with tempfile.TemporaryFile() as output:  # a pipe would have to wait for processes that the command leaves
            code = subprocess.call(  # noqa: S603  # nosec B603
                shlex.split(command), env=os.environ | {CRL_VARIABLE: str(crl.resolve())}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, timeout=COMMAND_TIMEOUT_S,
            )  # fmt: skip
            output.seek(max(0, output.seek(0, os.SEEK_END) - _MAX_SHOWN_OUTPUT))
            printed = output.read(_MAX_SHOWN_OUTPUT).decode(errors="replace").strip()
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise RevocationCommandError(f"on_revocation = {command!r}: {error_reason(error)}") from error
    if code:
        raise RevocationCommandError(
            f"on_revocation = {command!r}: exit code {code}{f': {printed}' if printed else ''}"
        )
    write_atomically(folder / NOTE_FILE, digest.encode())


@contextmanager
def list_delivery(command: str, folder: Path, crl: Path) -> Iterator[None]:
    """Run the command, unless it is `off`, on a thread whenever the list has changed, until the context ends."""
    note = folder / NOTE_FILE
    with storage_errors(f"can't write {note}"):
        if command == OFF:
            note.unlink(missing_ok=True)
        elif not note.exists():
            # Empty: a command that has never succeeded counts as one that has failed for the latest list.
            write_atomically(note, b"")
    if command == OFF:
        yield
        return
    closed = threading.Event()
    arguments = command, folder, crl, closed
    thread = threading.Thread(target=_deliver_changes, args=arguments, name="revocations", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join(POLL_S)


def _deliver_changes(command: str, folder: Path, crl: Path, closed: threading.Event) -> None:
    """Run the command for each changed list, with growing pauses while it fails."""
    pause, retry_s, cause = 0.0, FIRST_RETRY_S, ""
    while not closed.wait(pause):
        try:
            if not is_list_delivered(folder, crl):
                deliver_list(command, folder, crl)
                log.info("the broker was given the list of revoked certificates")
        except (RevocationCommandError, StorageError) as error:  # noqa: PERF203 - each turn waits anyway
            if str(error) != cause:
                log.error("the broker doesn't have the latest list of revoked certificates: %s", error)
            pause, retry_s, cause = retry_s, min(MAX_RETRY_S, 2 * retry_s), str(error)
        else:
            pause, retry_s, cause = POLL_S, FIRST_RETRY_S, ""


def _list_digest(crl: Path) -> str:
    with storage_errors(f"can't read {crl}"):
        return hashlib.sha256(crl.read_bytes()).hexdigest()
