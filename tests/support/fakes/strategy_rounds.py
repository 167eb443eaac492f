"""Rounds of a strategy without worker, boards or wire: its methods are called as the worker calls them, in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.rng import keyed_generator
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, LayerRow, Segment, TensorKind, TensorSpec
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors, mesh
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, PastUpdate, Scene, Submodel, Turn, UpdateReport

A, B = (Axis((Segment(g, 0, n),)) for g, n in enumerate((6, 4)))

NET = Architecture(
    "two layers, a norm and a head",
    (ChannelGroup("a", 6), ChannelGroup("b", 4)),
    (
        TensorSpec("first.weight", TensorKind.WEIGHT, (A, Axis.fixed(3))),
        TensorSpec("norm.weight", TensorKind.NORM_SCALE, (A,)),
        TensorSpec("norm.mean", TensorKind.STAT_MEAN, (A,)),
        TensorSpec("norm.variance", TensorKind.STAT_VAR, (A,)),
        TensorSpec("second.weight", TensorKind.WEIGHT, (B, A)),
        TensorSpec("second.bias", TensorKind.BIAS, (B,)),
        TensorSpec("head.weight", TensorKind.WEIGHT, (Axis.fixed(3), B)),
        TensorSpec("head.bias", TensorKind.BIAS, (Axis.fixed(3),)),
    ),
    tuple(LayerRow(n, "Gemm", f"{n}.weight", 1) for n in ("first", "second", "head")),
    (),
    (3,),
    (3,),
)
"""A small model with one of each kind of tensor."""

TRAINED = frozenset(t.name for t in NET.trainable)

Move = Callable[[Submodel, str, int], Tensors]
"""Makes what a device trained of what it was sent, by its name and the round."""


@dataclass
class Device:
    """A device of the play: channels per group, what its updates count for, and rounds in which it takes no part."""

    widths: tuple[int, ...] = NET.sizes
    density: float = 1.0
    weight: int = 10
    absent_rounds: frozenset[int] = frozenset()


@dataclass
class Play:
    """A job's rounds, which replace the model.

    Attributes:
        move: How devices train.
        squares: What devices report of squared gradients.
        memory: What the job remembers.
        past: What devices handed in last.
        sent: What devices were sent in the last round.
        reports: What they handed in.
        rejected: Whose updates stood out in it, and why.
    """

    strategy: Strategy
    model: Tensors
    devices: Mapping[str, Device]
    architecture: Architecture = NET
    move: Move = lambda submodel, device, round_: perturb_tensors(submodel, device, round_)
    squares: Callable[[Submodel, str, int], Tensors] = lambda submodel, device, round_: {}
    seed: int = 7
    memory: dict[str, dict[str, npt.NDArray[Any]]] = field(default_factory=dict)
    past: dict[str, PastUpdate] = field(default_factory=dict)
    round: int = 0
    sent: dict[str, Submodel] = field(default_factory=dict)
    reports: dict[str, UpdateReport] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)

    def play(self, rounds: int = 1) -> Tensors:
        """Some rounds; the model after them."""
        for _ in range(rounds):
            self._round()
        return self.model

    def scene(self, participants: Sequence[str] = ()) -> Scene:
        """The present round's scene."""
        return Scene(
            self.architecture, self.seed, self.round, self.model, dict(self.memory), Recipe(), tuple(participants)
        )

    def _round(self) -> None:
        self.round += 1
        names = sorted(n for n, d in self.devices.items() if self.round not in d.absent_rounds)
        scene, strategy = self.scene(names), self.strategy
        ranking = strategy.rank(scene)
        fold = strategy.aggregator.fold(scene, evidence=strategy.observes_movement)
        self.sent, self.reports = {}, {}
        for name in names:
            device = self.devices[name]
            turn = Turn(self.seed, self.round, name, device.widths, device.density, device.weight)
            selection = Selection.of(self.architecture, device.widths, ranking.ranks)
            cut = Cut(self.scene(), turn, selection, ranking.order, self.past.get(name))
            sent = strategy.extract(cut)
            trained = Submodel(sent.selection, self.move(sent, name, self.round), sent.mask)
            weight = device.weight if strategy.aggregator.weighting == "samples" else 1
            squares = self.squares(sent, name, self.round)
            report = UpdateReport(cut, trained, weight, 5, lambda sent=sent: sent, squares)  # type: ignore[misc]
            strategy.aggregator.add(fold, report, self._reconstruct(report))
            self.sent[name], self.reports[name] = sent, report
        closing = strategy.close(fold, scene, 1.0, lambda: ((r, self._reconstruct(r)) for r in self._all()))
        self.rejected = dict(closing.rejected)
        counts = self.round > strategy.exploration_rounds or strategy.exploration_updates_model
        memories = dict(closing.memories) if counts else {}
        memories |= strategy.learn(scene, fold, lambda: (r for n, r in self._named_reports() if n not in self.rejected))
        if counts:
            self.model = closing.model
        self.memory = {n: v for n, v in (self.memory | memories).items() if v}
        for name, report in self.reports.items():
            trained = report.trained
            self.past[name] = PastUpdate(trained.selection, trained.tensors, trained.mask, self.round)

    def _reconstruct(self, report: UpdateReport) -> Submodel:
        return self.strategy.reconstruct(report)

    def _all(self) -> Iterator[UpdateReport]:
        return iter(self.reports.values())

    def _named_reports(self) -> Iterator[tuple[str, UpdateReport]]:
        return iter(self.reports.items())


def perturb_tensors(submodel: Submodel, device: str, round_: int, scale: float = 0.1) -> Tensors:
    """What was sent, moved by normal numbers that belong to the places in the global model; masked elements stay."""
    out: Tensors = {}
    for spec in submodel.selection.architecture.tensors:
        value = submodel.tensors[spec.name]
        by = keyed_generator(1, device, round_, spec.name).standard_normal(spec.shape)[
            mesh(submodel.selection.maps(spec.name))
        ]
        after = (value + scale * by).astype(np.float32)
        if spec.name in submodel.mask:
            after = np.where(submodel.mask[spec.name], after, value)
        out[spec.name] = np.abs(after) if spec.kind is TensorKind.STAT_VAR else after
    return out


def identical(left: Tensors, right: Tensors) -> bool:
    """Whether two models have the same bits."""
    return left.keys() == right.keys() and all(left[n].tobytes() == right[n].tobytes() for n in left)
