"""The coordinator's commands to the server. A command may be carried out twice with the same effect as once.

Blobs are named by digest. The terms:

- `model`: the global model; a *basis* is the one that submodels are cut from.
- `ranking`: the order of its channels by importance (a selection at full width); `order`: that of its elements.
- `mask`: which elements of a submodel are active; None for all.
- `widths`: numbers of channels per group.
- `memory`: what the job remembers, by name.
- *part*: a device's participation in a round; *attempt*: the number of the device's offer in it.
- *contribution*: an update as it enters the *sums*, from which the next model is made.
- *cohort*: devices that were sent the same, whose masked updates are summed together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LastCountedUpdate:
    """A device's last counted update: the trained submodel as it came (`weights`), and what it was cut by.

    Attributes:
        codec: What it is encoded in; None for a plain tensor file.
        sent: Digest of the weights that the device was sent, which decoding needs; None for a plain tensor file.
    """

    round: int
    weights: str
    ranking: str
    widths: tuple[int, ...]
    mask: str | None = None
    codec: str | None = None
    sent: str | None = None


@dataclass(frozen=True)
class Basis:
    """The source of submodels: the global model of a round, with the order of its channels and elements."""

    round: int
    model: str
    ranking: str
    order: str | None = None
    memory: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """Rank channels, and elements where masks are made of them, for a round and its devices; answered by `Scored`.
    `core` are the widths that boards share, for which `Strategy.start_core` may change a new model; empty for none."""

    round: int
    model: str
    memory: dict[str, str]
    participants: tuple[str, ...]
    core: tuple[int, ...] = ()


@dataclass(frozen=True)
class DevicePart:
    """One device's part, as the worker needs to know it.

    Attributes:
        density: The share of the model that it was given.
        past: Its last counted update, when the part began.
        last_counted_round: The round of the offer behind that update, known whether updates are kept or not; 0 for
            none.
        work: How often the device trains the recipe's epochs.
    """

    device: str
    attempt: int
    widths: tuple[int, ...]
    density: float
    samples: int
    past: LastCountedUpdate | None
    last_counted_round: int = 0
    work: int = 1


@dataclass(frozen=True)
class ReceivedWeights:
    """The weights that a device received for its last counted update, and still has.

    `selection` is the first channels of `ranking`; `weights` is None where the device doesn't keep them.
    """

    selection: str
    ranking: str
    widths: tuple[int, ...]
    weights: str | None = None


@dataclass(frozen=True)
class Coding:
    """The codecs (`fedprune.updates.Codec`, as text) of a device's update and of the weights that it is sent.

    `received` is what an encoded transfer continues from; None for nothing, or where the server doesn't know.
    """

    update: str | None = None
    weights: str | None = None
    received: ReceivedWeights | None = None


@dataclass(frozen=True)
class Extract:
    """Make a device's submodel; answered by `Extracted`.

    Attributes:
        accumulate: Micro-batches in which the device works through a batch, unless the recipe asks for more.
        unit: What the device has measured that it trains on: `cpu` or `cuda`; empty where it hasn't measured.
        levels: Densities at which submodels of the same basis are split into increments (`Strategy.levels`).
    """

    basis: Basis
    part: DevicePart
    coding: Coding = Coding()
    accumulate: int = 1
    unit: str = ""
    levels: tuple[float, ...] = ()


@dataclass(frozen=True)
class PartCommand:
    """A command about one attempt of a device at a round."""

    device: str
    round: int
    attempt: int


@dataclass(frozen=True)
class SendOffer(PartCommand):
    """Offer a device its round; answered, sooner or later or never, by `UpdateAnnounced` or `OfferRefused`.

    Attributes:
        was_announced: Whether the device has announced an update of this offer before, which it may have lost since.
    """

    offer: dict[str, Any]
    was_announced: bool = False


@dataclass(frozen=True)
class PullUpdate(PartCommand):
    """Fetch an announced update's weights; answered by `UpdateStored`."""

    weights: dict[str, Any]


@dataclass(frozen=True)
class Acknowledge(PartCommand):
    """Tell a device that its update is durable."""

    weights: str


@dataclass(frozen=True)
class Cancel(PartCommand):
    """Tell a device that its part in a round is void."""

    reason: str


@dataclass(frozen=True)
class Contribution:
    """One device's stored update, as it enters the sums.

    Attributes:
        sent: Digest of the weights that it was sent.
        weights: Digest of the trained submodel.
        weight: What it counts for: the samples that the device was planned with, or what the schedule makes of them,
            scaled down where a round's sum would be more than sums can hold.
        steps: Optimiser steps behind it.
        widths: Of what it was sent, which an extractor may have made narrower than the part's; None for the part's.
        ranking: The ranking whose first channels it was sent, which may be an extractor's own; None for the basis's.
        codec: What the update is encoded in; None for a plain tensor file.
        shares: By tensor the share of the update's change that counts, where that is less than all of it; the worker
            decides it when a round closes.
    """

    basis: Basis
    part: DevicePart
    sent: str
    mask: str | None
    weights: str
    weight: int
    steps: int
    widths: tuple[int, ...] | None = None
    ranking: str | None = None
    codec: str | None = None
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FoldUpdate:
    """Check a stored update and add it to a round's sums; answered by `Folded` or `UpdateRejected`."""

    round: int
    model: str
    memory: dict[str, str]
    contribution: Contribution


@dataclass(frozen=True)
class CohortSum:
    """The sum of the masked updates of devices that were sent the same.

    Attributes:
        total: Digest of the vector.
        narrow: How many numbers of 32 bits the vector has, before those of 64 bits.
    """

    total: str
    narrow: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class SumMasked:
    """Have devices that have trained mask their updates, and sum those of each cohort; answered by `Unmasked`."""

    round: int
    cohorts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Close:
    """Turn the sums of exactly these contributions into a new global model; answered by `Closed`. Contributions that
    are not in the worker's sums yet are added first; `Closed.rejected` names those that can't be used, with the reason.

    Attributes:
        rate: Share of the way from the model to the sums' mean that the model moves.
        sums: The sums of all contributions, where updates are masked and the server can't read single ones.
    """

    round: int
    model: str
    memory: dict[str, str]
    participants: tuple[str, ...]
    contributions: tuple[Contribution, ...]
    rate: float = 1.0
    sums: tuple[CohortSum, ...] = ()


@dataclass(frozen=True)
class Evaluate:
    """Measure a global model on the server's data; answered by `Evaluated`.

    Attributes:
        spent: What it has cost of privacy (`fedprune.coordination.privacy_budget`); None where nothing is promised.
        foreseen: What that would be after another round.
        widths: The first channels that are measured, per group; empty for all.
    """

    round: int
    model: str
    spent: float | None = None
    foreseen: float | None = None
    ranking: str = ""
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class WakeAt:
    """Send `Ticked` at this time (seconds on the shell's clock)."""

    at: float


@dataclass(frozen=True)
class Finish:
    """The job is done; `model` is its result, `reason` why it has fewer rounds than it may have."""

    model: str
    reason: str = ""


@dataclass(frozen=True)
class TellFinished:
    """Tell a device that comes late that the job is done."""

    device: str
    model: str


DeviceCommand = SendOffer | PullUpdate | Acknowledge | Cancel | TellFinished
Command = DeviceCommand | Score | Extract | FoldUpdate | SumMasked | Close | Evaluate | WakeAt | Finish
