"""The roles that a strategy is composed of, and the values that they exchange.

Roles have no state of their own: what must last is in the job's memory, which is stored after every round, so that a
round can be repeated in another process with the same bits. The allocator is in `fedprune.strategies.allocation`; it
runs in the coordinator, which sees no tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fold import Fold
from fedprune.model.architecture import Architecture
from fedprune.model.element_mask import ElementMask
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.importance.scoring import Ranks

Memory = Mapping[str, Mapping[str, npt.NDArray[Any]]]
"""What a job remembers between rounds: named collections of tensors, such as `velocity`. Loaded when asked for."""

Memories = dict[str, dict[str, npt.NDArray[Any]]]
"""What a role wants remembered from now on, by the same names; an empty collection is forgotten."""


@dataclass(frozen=True)
class Turn:
    """One device's part in a round.

    Attributes:
        seed: The job's seed.
        round: The round, from 1.
        device: The device's name.
        widths: Its channels per group.
        density: The share of the model that it was given, above 0 and at most 1.
        samples: Its training samples.
        last: The round in whose offer it trained what it last handed in and counted; 0 where there is none.
    """

    seed: int
    round: int
    device: str
    widths: tuple[int, ...]
    density: float = 1.0
    samples: int = 1
    last: int = 0

    @property
    def pruning_rate(self) -> float:
        """1 − density."""
        return 1.0 - self.density


@dataclass(frozen=True, eq=False)
class Submodel:
    """What a device trains, or has trained.

    Attributes:
        selection: Where its channels live.
        tensors: In the selection's coordinates.
        mask: Which of its elements are active, in the same coordinates; None for all.
    """

    selection: Selection
    tensors: Tensors
    mask: ElementMask | None = None


@dataclass(frozen=True, eq=False)
class Past(Submodel):
    """What a device last handed in.

    Attributes:
        round: When.
    """

    round: int = 0

    def over(self, model: Tensors) -> Tensors:
        """Its tensors with a global model's values where it was masked, of which the device knows nothing."""
        if self.mask is None:
            return self.tensors
        active, below = self.mask.active, self.selection.gather(model)
        return {n: np.where(active[n], v, below[n]) if n in active else v for n, v in self.tensors.items()}


@dataclass(frozen=True, eq=False)
class Ranking:
    """An answer of a scorer.

    Attributes:
        ranks: Per group its channels, best first: a device of width k gets the first k.
        order: Importance per element of the global model, more is better, where masks are made of elements; None
            where there are none.
    """

    ranks: Ranks
    order: Tensors | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """A round as the worker's roles see it.

    Attributes:
        architecture: The model.
        seed: The job's seed.
        round: The round, from 1.
        model: The global model w_t.
        memory: What the job remembers.
        recipe: The job's local training, before the objective has written a device's.
        participants: The devices that take part, sorted; empty where a device's submodel is made.
    """

    architecture: Architecture
    seed: int
    round: int
    model: Tensors
    memory: Memory = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    participants: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Cut:
    """What there is to make one device's submodel of.

    Attributes:
        scene: The round.
        turn: The device's part.
        selection: The ranking's first channels, at the device's widths.
        order: The ranking's importance per element, in global coordinates; None where it has none.
        past: What the device last handed in, or None.
    """

    scene: Scene
    turn: Turn
    selection: Selection
    order: Tensors | None = None
    past: Past | None = None


@dataclass(frozen=True, eq=False)
class Report:
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
class Closing:
    """The end of a round.

    Attributes:
        model: The next global model.
        memories: What is to be remembered.
        rejected: Devices whose updates were left out after all, because they stand out among the others, and why.
    """

    model: Tensors
    memories: Memories = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)


class Starter(ABC):
    """Makes the job's first global model."""

    @abstractmethod
    def begin(self, architecture: Architecture, model: Tensors) -> Tensors:
        """The first global model, made from the imported one: the same tensors and shapes."""


class Scorer(ABC):
    """Ranks channels, and elements where there are element masks, once a round for all devices."""

    @property
    def observes(self) -> bool:
        """Whether it learns from how far weights moved, so that the fold records movements (`Fold(evidence=True)`)."""
        return False

    @abstractmethod
    def rank(self, scene: Scene) -> Ranking:
        """The ranking of this round."""

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[Report]]) -> Memories:
        """Memories of a round that is about to close.

        Args:
            scene: The round.
            fold: Its sums.
            reports: Reads the folded updates one by one.
        """
        return {}


class Extractor(ABC):
    """Makes a device's submodel of the global model, and maps the trained one back."""

    @property
    def device_independent(self) -> bool:
        """Whether devices of the same widths and density get the same submodel in a round, so that it is sent once."""
        return False

    @property
    def as_trained(self) -> bool:
        """Whether `reconstruct` returns what was trained unchanged, so that sums can be made tensor by tensor."""
        return False

    @abstractmethod
    def extract(self, cut: Cut) -> Submodel:
        """The submodel to send.

        Its selection is usually the cut's or a prefix of it. With other channels the offer carries a ranking of its
        own, to which `Report.trained` then refers.
        """

    @abstractmethod
    def reconstruct(self, report: Report) -> Submodel:
        """The trained submodel in global coordinates, as it enters the sums."""


class Personaliser(ABC):
    """What of a device's model is its own, as far as the server keeps it."""

    @property
    def device_independent(self) -> bool:
        """Whether it adds nothing of the device's own."""
        return False

    @property
    def as_trained(self) -> bool:
        """Whether `share` returns the reconstruction unchanged."""
        return False

    @abstractmethod
    def personalise(self, cut: Cut, submodel: Submodel) -> Submodel:
        """The submodel to send, with the device's own parts in it."""

    @abstractmethod
    def share(self, report: Report, lifted: Submodel) -> Submodel:
        """The part of a reconstructed submodel that enters the global model."""


class Objective(ABC):
    """What a board minimises."""

    @abstractmethod
    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        """The device's recipe of this round, made from the job's."""


class Aggregator(ABC):
    """Turns a round's updates into the next global model."""

    @property
    def weighting(self) -> str:
        """`samples`: devices count by their training samples; `uniform`: all count the same."""
        return "samples"

    @property
    def by_tensor(self) -> bool:
        """Whether a tensor's sums depend on that tensor of the updates alone, so that they can be made in parts."""
        return False

    @abstractmethod
    def fold(self, scene: Scene, *, evidence: bool) -> Fold:
        """Empty sums for a round."""

    @abstractmethod
    def add(self, fold: Fold, report: Report, lifted: Submodel) -> None:
        """Add a reconstructed update: all of it or, if this raises, nothing."""

    @abstractmethod
    def close(
        self, fold: Fold, scene: Scene, rate: float, reports: Callable[[], Iterator[tuple[Report, Submodel]]]
    ) -> Closing:
        """The next model.

        Args:
            fold: The sums.
            scene: The round.
            rate: Share of the way from w_t to the sums' mean that the schedule allows (1 in synchronous rounds).
            reports: Reads all updates again, each with its reconstruction, for what is not a sum (a median).
        """
