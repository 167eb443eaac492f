"""The values that a strategy's methods take and return.

Before a round: `Scene` (the round) and `Turn` (one device in it). To make a submodel: `Cut` gives `Submodel`. After
training: `UpdateReport`. At the end: `RoundClosing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ElementMask, Selection, Tensors
from fedprune.strategies.importance.scoring import Ranks

# A job's memory between rounds, as it is read: named collections of tensors, such as `velocity`, loaded when asked for.
Memory = Mapping[str, Mapping[str, npt.NDArray[Any]]]

# What a round writes to the memory, by the same names; an empty collection is forgotten.
NewMemory = dict[str, dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class Turn:
    """One device's part in a round.

    Attributes:
        seed: The job's seed, from which every random choice is derived.
        round: The round, from 1.
        device: The device's name; empty for a submodel that any device might get.
        widths: Its channels per group.
        density: The share of the model that it was given, above 0 and at most 1.
        samples: The training samples that the device was planned with.
        last_counted_round: The round whose offer its last counted update was trained for; 0 before the first.
        work: How often it trains the recipe's epochs; its recipe already says so when the device gets it.
        macs_share: MACs of a training step, as a share of the whole model's.
    """

    seed: int
    round: int
    device: str
    widths: tuple[int, ...]
    density: float = 1.0
    samples: int = 1
    last_counted_round: int = 0
    work: int = 1
    macs_share: float = 1.0

    @property
    def pruning_rate(self) -> float:
        """1 − density."""
        return 1.0 - self.density


@dataclass(frozen=True, eq=False)
class Submodel:
    """A device's submodel, as it is sent or as it was trained.

    Attributes:
        selection: Where its channels live.
        tensors: In the selection's coordinates.
        mask: Which of its elements are active, in the same coordinates.
        drift: What the device adds to its gradients in every step, by trained tensor, in the same coordinates.
    """

    selection: Selection
    tensors: Tensors
    mask: ElementMask = field(default_factory=dict)
    drift: Tensors = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True, eq=False)
class PastUpdate(Submodel):
    """A device's last update."""

    round: int = 0

    def tensors_over(self, model: Tensors) -> Tensors:
        """Its tensors with a global model's values where it was masked, of which the device knows nothing."""
        if not self.mask:
            return self.tensors
        fill_values = self.selection.gather(model)
        return {n: np.where(self.mask[n], v, fill_values[n]) if n in self.mask else v for n, v in self.tensors.items()}


@dataclass(frozen=True, eq=False)
class Ranking:
    """The order of channels, and of elements.

    Attributes:
        ranks: Per group its channels, best first: a device of width k gets the first k.
        order: Importance per element of the global model, more is better, where masks are made of elements; None
            where there are none.
    """

    ranks: Ranks
    order: Tensors | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """A round as a strategy sees it: the global model, the job's memory, and the devices that take part.

    Attributes:
        round: The round, from 1.
        model: The global model w_t.
        recipe: The job's local training, which a strategy may change for each device.
        participants: The devices that take part, sorted; empty where a device's submodel is made.
        ranks: Per group its channels, best first, as an earlier fleet that trained the job's first model cut it; None
            where none did.
    """

    architecture: Architecture
    seed: int
    round: int
    model: Tensors
    memory: Memory = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    participants: tuple[str, ...] = ()
    ranks: Ranks | None = None


@dataclass(frozen=True, eq=False)
class Cut:
    """The input from which one device's submodel is made.

    Attributes:
        selection: The ranking's first channels, at the device's widths.
        order: The ranking's importance per element, in global coordinates; None where it has none.
        past: The device's last update, or None.
    """

    scene: Scene
    turn: Turn
    selection: Selection
    order: Tensors | None = None
    past: PastUpdate | None = None


@dataclass(frozen=True, eq=False)
class UpdateReport:
    """A stored update, as it enters the sums.

    Attributes:
        cut: What the device's submodel was made of, as it was then: in an asynchronous job `cut.scene.model` may be an
            earlier model than the one that is folded onto.
        trained: What the device made of its submodel; its tensors have passed `Fold.check`.
        weight: What it counts for, from 1 up.
        steps: Optimiser steps behind it.
        read_sent: Reads the submodel that it was sent.
        squares: Squared gradients of the last step by tensor, where the recipe asks for them; in the submodel's
            coordinates, finite and not negative (`fedprune.aggregation.client_update.check_squares`). A device may
            leave some out.
    """

    cut: Cut
    trained: Submodel
    weight: int
    steps: int
    read_sent: Callable[[], Submodel]
    squares: Tensors = field(default_factory=dict)

    @cached_property
    def sent(self) -> Submodel:
        """The submodel that the device was sent."""
        return self.read_sent()


@dataclass(frozen=True, eq=False)
class RoundClosing:
    """What a round leaves: the next global model, and what the job remembers.

    Attributes:
        rejected: Devices whose updates were left out after all, as a strategy of a user may decide, and why.
    """

    model: Tensors
    memories: NewMemory = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SelfDistillation:
    """The server's training of each new global model, where it has unlabelled samples: to train it towards
    the mean of the outputs of all its widths.

    Attributes:
        steps: Steps of Adam per round, each at a random width.
        densities: The narrower widths, as shares of every group's channels; empty for those that boards trained.
        lr: The learning rate.
    """

    steps: int
    densities: tuple[float, ...]
    lr: float
