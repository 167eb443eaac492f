"""What the coordinator wants done. A command may be carried out twice with the same effect as once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """Rank the channels of `model`; answered by `Scored`.

    Attributes:
        scorer: Name of the scorer, or `random` for a warm-up round.
        evidence: Digest of the evidence that the scorer may use.
    """

    round: int
    scorer: str
    model: str
    evidence: str | None


@dataclass(frozen=True)
class Extract:
    """Gather a device's submodel out of `model`; answered by `Extracted`."""

    round: int
    device: str
    attempt: int
    model: str
    ranking: str
    widths: tuple[int, ...]


@dataclass(frozen=True)
class SendOffer:
    """Offer a device its round; answered, sooner or later or never, by `UpdateAnnounced` or `OfferRefused`."""

    device: str
    round: int
    attempt: int
    offer: dict[str, Any]


@dataclass(frozen=True)
class PullUpdate:
    """Fetch an announced update's weights; answered by `UpdateStored`."""

    device: str
    round: int
    attempt: int
    weights: dict[str, Any]


@dataclass(frozen=True)
class Acknowledge:
    """Tell a device that its update is durable."""

    device: str
    round: int
    attempt: int
    weights: str


@dataclass(frozen=True)
class Cancel:
    """Tell a device that its part in a round is void."""

    device: str
    round: int
    attempt: int
    reason: str


@dataclass(frozen=True)
class Contribution:
    """One device's stored update, as it enters the sums.

    Attributes:
        device: Whose it is.
        attempt: The attempt that it answers.
        weights: Digest of the trained submodel.
        widths: Its widths.
        weight: What it counts for: the samples that the device was planned with, scaled down where a round's sum would
            be more than sums can hold.
        steps: Optimiser steps behind it.
    """

    device: str
    attempt: int
    weights: str
    widths: tuple[int, ...]
    weight: int
    steps: int


@dataclass(frozen=True)
class Fold:
    """Check a stored update and add it to the round's sums; answered by `Folded` or `UpdateRejected`."""

    round: int
    model: str
    ranking: str
    contribution: Contribution


@dataclass(frozen=True)
class Close:
    """Turn the sums of exactly these contributions into a new global model; answered by `Closed`.

    Contributions that are not in the worker's sums (it may be new) are added first.
    """

    round: int
    model: str
    ranking: str
    velocity: str | None
    evidence: str | None
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True)
class Evaluate:
    """Measure a global model on the server's data; answered by `Evaluated`."""

    round: int
    model: str


@dataclass(frozen=True)
class Wake:
    """Send `Ticked` at this time (seconds on the shell's clock)."""

    at: float


@dataclass(frozen=True)
class Finish:
    """The job is done; `model` is its result."""

    model: str


@dataclass(frozen=True)
class TellFinished:
    """Tell a device that comes late that the job is done."""

    device: str
    model: str


Command = (
    Score
    | Extract
    | SendOffer
    | PullUpdate
    | Acknowledge
    | Cancel
    | Fold
    | Close
    | Evaluate
    | Wake
    | Finish
    | TellFinished
)
