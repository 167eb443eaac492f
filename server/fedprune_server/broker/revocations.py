"""The operator's command that brings a changed list of revoked certificates to the broker.

Whoever revokes, an operator at a terminal, one in the console or a start that completes what was lost, changes
`crl.pem`. The running server notices and runs the command, again and again until it succeeds; what it succeeded with
is noted in the state folder, so that a revocation while no server ran is made up for at the next start.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import subprocess  # nosec B404  # the operator's own command, never a shell
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedprune.disk import storage_errors, write_whole
from fedprune.errors import BrokerError, StorageError, reason
from fedprune_server.settings.alert_settings import OFF

log = logging.getLogger("fedprune.server")

VARIABLE = "FEDPRUNE_CRL"
"""Names the list for the command."""

NOTE = "revocations-given"
"""File of the state folder: sha256 of the list for which the command succeeded last."""

LOOKED_S = 1.0
AGAIN_S = 30.0
LASTS_S = 60.0
_SHOWN = 500


class RevocationCommandError(BrokerError):
    """The command failed."""


def given(folder: Path, crl: Path) -> bool:
    """Whether the command has succeeded for the list as it is.

    Args:
        folder: The state folder.
        crl: The list.

    Raises:
        StorageError: One of the two files can't be read.
    """
    with storage_errors(f"can't read {folder / NOTE}"):
        note = folder / NOTE
        return note.exists() and note.read_text(errors="replace").strip() == _digest(crl)


def give(command: str, folder: Path, crl: Path) -> None:
    """Run the command for the list as it is, and note that it succeeded.

    Args:
        command: The command's words, quoted as for a shell, which runs none of it.
        folder: The state folder.
        crl: The list.

    Raises:
        RevocationCommandError: It can't be started, fails, or takes too long.
        StorageError: The list can't be read or the note not be written.
    """
    digest = _digest(crl)
    try:
        done = subprocess.run(  # noqa: S603  # nosec B603
            shlex.split(command), env=os.environ | {VARIABLE: str(crl.resolve())}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LASTS_S, check=False,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise RevocationCommandError(f"on_revocation = {command!r}: {reason(error)}") from error
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()[-_SHOWN:]
        raise RevocationCommandError(f"on_revocation = {command!r}: exit code {done.returncode}", got=said or None)
    write_whole(folder / NOTE, digest.encode())


@contextmanager
def given_to_broker(command: str, folder: Path, crl: Path) -> Iterator[None]:
    """While the body runs, run the command whenever the list has changed, in a thread.

    Args:
        command: As for `give`; `off` for none.
        folder: The state folder.
        crl: The list.
    """
    if command == OFF:
        yield
        return
    closed = threading.Event()
    thread = threading.Thread(target=_watch, args=(command, folder, crl, closed), name="revocations", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join(LOOKED_S)


def _watch(command: str, folder: Path, crl: Path, closed: threading.Event) -> None:
    pause = 0.0
    while not closed.wait(pause):
        pause = LOOKED_S
        try:
            if not given(folder, crl):
                give(command, folder, crl)
                log.info("the broker was given the list of revoked certificates")
        except (RevocationCommandError, StorageError) as error:
            log.error("the broker doesn't have the latest list of revoked certificates: %s", error)
            pause = AGAIN_S


def _digest(crl: Path) -> str:
    with storage_errors(f"can't read {crl}"):
        return hashlib.sha256(crl.read_bytes()).hexdigest()
