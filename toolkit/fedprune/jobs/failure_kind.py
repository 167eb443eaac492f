"""Kinds of failure: why a device's part of a round came to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fedprune.core.errors import BundleError, ExitCode, FedpruneError, OutOfRangeError, ProtocolError


class FailureKind(str, Enum):
    """Why a device's part of a round came to nothing; the reason next to it is a text for people."""

    # Training ended in numbers that are not finite, or far too large.
    DIVERGED = "diverged"
    LATE = "late"
    # The device was in a secure sum, and left it before its update was.
    LOST = "lost"
    # The sum of masked updates that it is in is false, by the fault of one of its boards.
    FALSE_SUM = "false sum"
    # The update was in none of the round's sums, to find out which board has spoilt one.
    LEFT_OUT = "left out"
    # The update stands out among those of the round.
    OUTLIER = "outlier"
    QUARANTINED = "quarantined"
    REVOKED = "revoked"
    # The device no longer has the update that it announced.
    GONE = "gone"
    # No honest board sends such an update, since it checks its weights before it announces them.
    MALFORMED = "malformed"
    NO_ROOM = "no room"
    DATA = "data"
    # The model or its ranking changed in the meantime.
    STALE = "stale"
    OTHER = "other"


# Kinds of failure of a device that delivered nothing; nothing of it was refused.
UNDELIVERED_KINDS = (FailureKind.LATE, FailureKind.LOST, FailureKind.GONE)


@dataclass(frozen=True)
class Failure:
    """A kind of failure, and the reason."""

    kind: FailureKind
    reason: str


_KIND_OF_EXIT_CODE: dict[int, FailureKind] = {
    ExitCode.DIVERGED: FailureKind.DIVERGED,
    ExitCode.STORAGE_FULL: FailureKind.NO_ROOM,
    ExitCode.DATA: FailureKind.DATA,
}


def kind_of_exit_code(code: int) -> FailureKind:
    """The kind of a failure on a board, by the exit code of its error."""
    return _KIND_OF_EXIT_CODE.get(code, FailureKind.OTHER)


def kind_of_update_error(error: FedpruneError) -> FailureKind:
    """The kind of an error that reading or checking an update has raised."""
    if isinstance(error, OutOfRangeError):
        return FailureKind.DIVERGED
    return FailureKind.MALFORMED if isinstance(error, (ProtocolError, BundleError)) else FailureKind.OTHER
