"""Alerts about boards that join: they wait for approval, stay silent, or are too many."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from fedprune.wire.lost_pieces import dropping_broker_message
from fedprune_server.devices.join_flood import JOIN_FLOOD_S
from fedprune_server.monitoring.alerts import INFO, MAX_ALERTS_OF_KIND, WARNING, Alert, alert_rule, server_command
from fedprune_server.monitoring.participation import format_minute
from fedprune_server.monitoring.situation import Situation

# Seconds after joining within which a board announces itself: one that doesn't measure itself first, and any board.
_ANNOUNCEMENT_TIMEOUT_S, _MEASUREMENT_TIMEOUT_S = 25.0, 120.0


@alert_rule("devices-wait", WARNING)
def waiting_boards(situation: Situation, now: float) -> Iterator[Alert]:
    waiting = {} if situation.site is None else situation.site.waiting_keys
    for name, fingerprint in islice(waiting.items(), MAX_ALERTS_OF_KIND):
        yield Alert(
            "devices-wait", WARNING, now, f"{name} waits for approval", "until then all that it sends is dropped",
            "compare the key with what the board shows, then "
            + server_command(situation.folder, "devices", "approve", name, "--key", fingerprint),
            device=name,
        )  # fmt: skip


@alert_rule("device-unheard", WARNING, INFO)
def unheard_boards(situation: Situation, now: float) -> Iterator[Alert]:
    """Boards that could join, and of which the server hears nothing else."""
    if situation.site is None or not situation.is_running:
        return
    for name, joined in islice(situation.site.unannounced_boards.items(), MAX_ALERTS_OF_KIND):
        if now - joined >= _ANNOUNCEMENT_TIMEOUT_S:
            yield Alert(
                "device-unheard", WARNING if now - joined >= _MEASUREMENT_TIMEOUT_S else INFO, joined,
                f"{name} joined at {format_minute(joined)}, and its announcement has not come: it is off, still "
                f"measures itself, or {dropping_broker_message('what it sends')}",
                "it takes no part until the server hears it",
                "see the board's own log; where that says that it is connected, look at the broker's rules for its "
                "name (docs/runbook.md#the-broker-drops-messages)",
                device=name,
            )  # fmt: skip


@alert_rule("joins-flooded", WARNING)
def join_flood(situation: Situation, now: float) -> Iterator[Alert]:
    """An alert about a flood of requests to join. Its key has no client id, because a sender can choose another one for
    each request; the text names it."""
    client = situation.flooding_client
    if client is None:
        return
    if client:
        sender, block = f"most of them lately from the MQTT client {client}", "block the client's address"
    else:
        sender = "from many MQTT clients"
        block = "wait for the others if you expect this many boards, since they ask again; else block their addresses"
    yield Alert(
        "joins-flooded", WARNING, now,
        f"more requests to join arrive than the server reads, {sender}",
        "some are dropped, so boards may not get through with theirs; boards that have joined are not affected",
        f"{block}, which the broker's log shows; while no board is to join, close the broker's listener for joining "
        "(docs/security.md#floods)",
        delay_s=JOIN_FLOOD_S,
    )  # fmt: skip
