"""What a table compares, and how: data, net, fleet, local training, methods."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.accuracy.nets import definition
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find_profile

AVERAGE = 0.85
"""Decay of the moving average that every device keeps of its own trained weights, whatever the method: it is measured
beside the last weights, and costs no bytes."""

CALIBRATION = 512
"""Training samples of all devices together, without labels, on which batch-norm statistics are measured again."""

INT8, INT4, FLOAT32 = ({"compression": codec, "compression_down": codec} for codec in ("int8", "int4", "none"))
"""Codecs of updates and of weights, as settings of a job."""

FULL = "fedavg float32"
"""The row by whose bytes and multiplications all are counted: the whole model on every board, without a codec."""

SAME_LOSS = "fedavg same loss"
"""The row of `fedprune`'s local training on the whole model: what its widths and its ordered dropout cost."""


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        name: Its name in the table, unique there.
        strategy: The job's strategy.
        options: The strategy's options; `densities` is the protocol's unless it is given here.
        recipe: Settings of local training that differ from the protocol's.
        job: Settings of the job that differ, such as rounds.
        densities: Whether the strategy gets the protocol's densities.
        elements: Whether its submodels are made of elements: for densities it gets the shares of elements that weigh
            what submodels of the protocol's densities weigh (`benchmarks.accuracy.shares`).
        served_model: What a board predicts with by this method: `after`, the model that it trained last, or `average`.
        samples: Whether the server has the `CALIBRATION` samples, as one with the table `[calibration]`.
    """

    name: str
    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)
    densities: bool = True
    elements: bool = False
    served_model: str = "after"
    samples: bool = False

    @property
    def published(self) -> bool:
        """Whether it is a method of others, or one of their parts."""
        return self.strategy != "fedprune"


@dataclass(frozen=True)
class Board:
    """The kind of board of one tier of the fleet.

    Attributes:
        profile: Name of a shipped hardware profile.
        down_mb_s: Its link from the server, in megabytes a second; 0 for the profile's.
        up_mb_s: Its link to the server.
    """

    profile: str
    down_mb_s: float = 0.0
    up_mb_s: float = 0.0


BOARDS = (
    Board("jetson-orin-nano", 4, 1),
    Board("raspberry-pi-5", 2, 0.5),
    Board("raspberry-pi-4b", 1, 0.25),
    Board("raspberry-pi-zero-2w", 0.25, 0.0625),
)
"""A fleet in which what a board can train goes with how fast it is reached: a cable, a shared one, Wi-Fi, a modem."""


@dataclass(frozen=True)
class Protocol:
    """How a table's methods are compared.

    Attributes:
        name: What the command calls the table.
        title: Its heading.
        source: The data set.
        data: Settings of `DataPlan`, without source and seed.
        net: The network.
        recipe: Local training.
        rounds: How many rounds.
        methods: The rows.
        densities: Densities of the fleet's tiers, dealt in the order of devices.
        boards: The tiers' boards.
        reference: The row that others are compared with, seed by seed.
        seeds: Of data, initial weights and the job.
        job: Further settings of the job.
        target: Accuracy of the global model whose simulated time is listed; 0 for none.
        submodels: Whether submodels of the global model are measured.
        every: Submodels are measured every so many rounds; the global model `every_global`.
        every_global: See `every`.
        until_s: The run ends at this simulated time instead of after `rounds`; 0 for never.
        ends_at_target: A run ends as soon as the global model is found at the target.
        every_s: Measured whenever so many simulated seconds have passed, instead of every so many rounds; 0 for rounds.
        weather: Settings of `Weather`.
        minutes: CPU minutes of one run, roughly, on the machine of the results.
        reads: The rounds, as shares of all, whose mean is a run's figure.
        full: Whether it is a paper's full protocol, made for a GPU.
        changes: What a command line has changed, for the page; such a run is a look, no result.
    """

    name: str
    title: str
    source: str
    data: Mapping[str, Any]
    net: str
    recipe: Recipe
    rounds: int
    methods: tuple[Method, ...]
    densities: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    boards: tuple[Board, ...] = BOARDS
    reference: str = "heterofl"
    seeds: tuple[int, ...] = (0, 1, 2)
    job: Mapping[str, Any] = field(default_factory=dict)
    target: float = 0.0
    submodels: bool = True
    every: int = 5
    every_global: int = 1
    until_s: float = 0.0
    ends_at_target: bool = False
    every_s: float = 0.0
    weather: Mapping[str, Any] = field(default_factory=dict)
    minutes: float = 4.0
    reads: tuple[float, ...] = (0.5, 0.75, 1.0)
    full: bool = False
    changes: str = ""

    def method(self, name: str) -> Method:
        """A row by its name."""
        return next(m for m in self.methods if m.name == name)

    def lasting(self, rounds: int) -> Protocol:
        """The protocol with as many rounds, the same for all rows."""
        methods = tuple(replace(m, job=_without(m.job, "rounds")) for m in self.methods)
        return replace(self, rounds=rounds, methods=methods)

    def key(self, method: Method, seed: int, *, cuda: bool = False) -> str:
        """Digest of the settings that decide a run's numbers: results of others are not mixed in."""
        unread = ("title", "methods", "seeds", "reference", "target", "minutes", "reads", "name", "changes")
        parts = _without(asdict(self), *unread, *(() if self.ends_at_target else ("ends_at_target",)))
        parts["recipe"] = self.recipe.to_offer()  # settings that came later have their default in earlier runs
        row = _without(asdict(method), "name", "served_model")
        boards = [_without(find_profile(b.profile).to_dict(), "sources", "support") for b in self.boards]
        trainer = "cuda" if cuda else "onnxruntime"
        what = [parts, row, seed, trainer, boards, definition(self.net), AVERAGE, CALIBRATION]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in names}
