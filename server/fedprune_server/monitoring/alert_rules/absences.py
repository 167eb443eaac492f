"""Alerts about boards that no longer take part in a job, one for each board."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fedprune_server.monitoring import participation
from fedprune_server.monitoring.alerts import (
    BOARD_LOG_COMMAND,
    INFO,
    MAX_ALERTS_OF_KIND,
    WARNING,
    Alert,
    alert_rule,
    server_command,
)
from fedprune_server.monitoring.participation import Absence
from fedprune_server.monitoring.situation import Situation


@alert_rule(participation.QUARANTINE, WARNING)
@alert_rule(participation.CLONED, WARNING, counted=True)
@alert_rule(participation.EXCLUDED, WARNING)
@alert_rule(participation.UNDELIVERED, WARNING, counted=True)
@alert_rule(participation.FAILING, WARNING, INFO, counted=True)
@alert_rule(participation.AWAY, WARNING)
def absent_boards(situation: Situation, now: float) -> Iterator[Alert]:
    """An alert for each board that no longer takes part, with the reason."""
    count = Counter[str]()
    for name, absence in situation.absences.items():
        count[absence.kind] += 1
        if count[absence.kind] <= MAX_ALERTS_OF_KIND:
            why, todo = _remedy(situation, name, absence)
            severity = INFO if absence.is_slow else WARNING
            yield Alert(absence.kind, severity, absence.since, f"{name} {absence.reason}", why, todo, device=name)


def _remedy(situation: Situation, name: str, absence: Absence) -> tuple[str, str]:
    """The consequence of a board's absence, and what to do about it."""
    crashes = server_command(situation.folder, "crashes", "--device", name)
    replace = server_command(situation.folder, "devices", "replace", name)
    revoke = server_command(situation.folder, "devices", "revoke", name)
    consequence = "rounds go on without what its samples would teach the model"
    match absence.kind:
        case participation.QUARANTINE:
            return "what it sends is dropped unread", (
                f"see the board's own log, by `{BOARD_LOG_COMMAND}` there; it ends by itself, and a board that isn't "
                f"yours is revoked by {revoke}"
            )
        case participation.CLONED:
            return "the two disturb each other, and the server hears now one and now the other", (
                "look for a second board with a copy of its card or state folder, and take it away; or give both new "
                f"keys: {replace}, and let each join with a name "
                "and claim of its own (docs/runbook.md#two-boards-with-one-identity)"
            )
        case participation.UNDELIVERED:
            return "its part in the round can't come to an end, however long the deadline is", (
                "let the broker pass packets of at least 33,280 bytes (message_size_limit, max_packet_size), and what "
                "its rules must let through (docs/runbook.md#the-broker-drops-messages)"
            )
        case participation.AWAY:
            return consequence, (
                f"see that it has power and network, and {crashes}; a board that is gone for good is revoked by "
                f"{revoke}"
            )
        case _:
            # One that can't start has sent nothing but the reason.
            ended = f", and {crashes} how its program ended before" if absence.kind == participation.EXCLUDED else ""
            return consequence, (
                f"mend what the reason names on the board and start it again; on the board `{BOARD_LOG_COMMAND}` shows "
                f"its log{ended} (docs/runbook.md#a-board-cant-start)"
            )
