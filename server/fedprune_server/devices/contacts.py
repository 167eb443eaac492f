"""What the server knows of a device from its messages, beside the coordinator's state: its contact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedprune.wire.messages import RoundProgress

# Shared by all devices without metrics, to save memory: metrics are replaced, never changed in place.
_NO_METRICS: Mapping[str, float] = {}


@dataclass(slots=True)
class Contact:
    """A device's volatile state, in addition to the coordinator's.

    Attributes:
        bytes_down: Payload bytes to the device, over all starts of the server.
        bytes_up: Payload bytes from it.
        progress: Its last report on its current part.
        sent_part: Round and attempt of the last offer that was really sent to it.
        offered_at: Time at which that was first sent; None once its update has arrived.
        sent_at: Time at which it was last sent, in seconds of listening (`ListeningClock`).
        heard_at: Time of its last sign of working on that offer; at first, of the sending. In seconds of listening.
        part_seconds: Time from its last offer until its update arrived.
        metrics: Scores of the model that it serves, on its own test samples, as last reported.
        introduced: Hash of the plan with which it was last logged.
        problem: The reason for which it can't take part; empty without one.
        temperature_c: As reported last: at its start, or while it worked.
        last_message_at: Seconds since 1970; None before the first message since the server's start.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    progress: RoundProgress | None = None
    software: str = ""
    sent_part: tuple[int, int] | None = None
    offered_at: float | None = None
    sent_at: float = 0.0
    heard_at: float = 0.0
    part_seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=lambda: _NO_METRICS)
    introduced: int = 0
    problem: str = ""
    temperature_c: float | None = None
    last_message_at: float | None = None
