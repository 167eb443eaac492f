"""Strategies that only experiments need: parts of published ones, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from fedprune.aggregation.fold import Fold
from fedprune.core.rng import keyed_generator
from fedprune.jobs.job import Job
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import Tiers
from fedprune.strategies.channel_ranking import RankedChannels
from fedprune.strategies.methods.autoflip import AutoFlip, autoflip
from fedprune.strategies.methods.fedobp import FedObp, fedobp
from fedprune.strategies.methods.subflot import SubFlot, subflot
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, NewMemory, Ranking, Scene, Submodel, UpdateReport

PERSONAL = "personal elements"
"""Memory of `counted_fedobp`: per tensor how many elements of submodels were devices' own, and of how many."""


@dataclass(frozen=True)
class SliceOptions:
    """Settings of `slices`.

    Attributes:
        densities: The tiers.
    """

    densities: tuple[float, ...] = (1.0,)


def slices(job: Job) -> Strategy:
    """Submodels of ranked channels and a mean of them, with nothing else: what HeteroFL is without its extras."""
    allocator = Tiers(read_options(job, SliceOptions).densities)
    return RankedChannels(
        "slices", scorer="ordered", aggregator=Mean("coverage", 0.0, "samples"), inputs="sum", allocator=allocator
    )


class SlicedSubFlot(SubFlot):
    """SubFLOT whose submodels are slices at fixed positions (its Table 7, without OTP)."""

    def extract(self, cut: Cut) -> Submodel:
        return Strategy.extract(self, cut)


class InPlaceSubFlot(SubFlot):
    """SubFLOT whose updates are averaged at their own positions (its Table 7, without OTA)."""

    def reconstruct(self, report: UpdateReport) -> Submodel:
        return report.trained


class RandomFlip(AutoFlip):
    """AutoFLIP that masks as many elements in every round, but random ones."""

    def rank(self, scene: Scene) -> Ranking:
        ranking = super().rank(scene)
        if ranking.order is None:
            return ranking
        # Shuffled over all tensors together, as the share that the quantile masks is one over all tensors.
        drawn = keyed_generator(scene.seed, "random masks").permutation(
            np.concatenate([v.reshape(-1) for v in ranking.order.values()])
        )
        ends = np.cumsum([v.size for v in ranking.order.values()])[:-1]
        parts = zip(ranking.order.items(), np.split(drawn, ends), strict=True)
        return Ranking(ranking.ranks, {name: part.reshape(value.shape) for (name, value), part in parts})


class CountedFedObp(FedObp):
    """FedOBP that counts which elements of its submodels are devices' own."""

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[UpdateReport]]) -> NewMemory:
        counts = {t.name: np.zeros(2, np.int64) for t in scene.architecture.trainable}
        for report in reports():
            slice_ = report.sent.selection.gather(report.cut.scene.model)
            for name, count in counts.items():
                count += np.array([(report.sent.tensors[name] != slice_[name]).sum(), slice_[name].size])
        return super().learn(scene, fold, reports) | {PERSONAL: dict(counts)}


def sliced_subflot(job: Job) -> Strategy:
    return SlicedSubFlot(**vars(subflot(replace(job, strategy="subflot"))))


def in_place_subflot(job: Job) -> Strategy:
    return InPlaceSubFlot(**vars(subflot(replace(job, strategy="subflot"))))


def random_flip(job: Job) -> Strategy:
    return RandomFlip(**vars(autoflip(replace(job, strategy="autoflip", options={"structured": False, **job.options}))))


def counted_fedobp(job: Job) -> Strategy:
    return CountedFedObp(**vars(fedobp(replace(job, strategy="fedobp"))))
