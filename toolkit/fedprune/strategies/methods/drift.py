"""SCAFFOLD (Karimireddy et al. 2020), FedDyn (Acar et al. 2021) and FedCM (Xu et al. 2021): gradients with a drift.

The server holds all state, and sends each board its drift. `docs/strategies/drift.md` has equations and readings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fedprune.aggregation.fold import Fold
from fedprune.aggregation.update_sums import free_steps
from fedprune.core.errors import ConfigError
from fedprune.core.settings import bounded
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors, mesh
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import density_allocator
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, NewMemory, RoundClosing, Scene, Submodel, Turn, UpdateReport

# Memory, in global coordinates: what the fleet's boards share, and one collection for each board that has trained.
SHARED, OWN = "shared", "own/"


@dataclass(frozen=True)
class FedDynOptions:
    """Options of `feddyn`, which `docs/strategies/drift.md` explains."""

    alpha: float = bounded(0.01, 0, 1e6, above=True)
    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)


@dataclass(frozen=True)
class ScaffoldOptions:
    """Options of `scaffold`, which `docs/strategies/drift.md` explains."""

    server_lr: float = bounded(1.0, 0, 10, above=True)
    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)


@dataclass(frozen=True)
class FedCmOptions(ScaffoldOptions):
    """Options of `fedcm`, which `docs/strategies/drift.md` explains."""

    alpha: float = bounded(0.1, 0, 1, above=True)


@dataclass(frozen=True)
class ServerRate(Strategy):
    """Boards add a drift, and the model goes the share `server_lr` (η_g) of the way to their mean."""

    server_lr: float = 1.0

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        return replace(recipe, drift=True)

    def close(
        self, fold: Fold, scene: Scene, rate: float, reports: Callable[[], Iterator[tuple[UpdateReport, Submodel]]]
    ) -> RoundClosing:
        return super().close(fold, scene, rate * self.server_lr, reports)


@dataclass(frozen=True)
class Scaffold(ServerRate):
    """Board i adds c − c_i to its gradients; c_i ← c_i − c + (x − y_i)/(K·lr) (Alg. 1, option II), c is their mean."""

    def extract(self, cut: Cut) -> Submodel:
        shared, own = (cut.scene.memory.get(name, {}) for name in (SHARED, OWN + cut.turn.device))
        drift = {n: v - own[n] if n in own else v for n, v in shared.items()}
        return with_drift(super().extract(cut), drift)

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[UpdateReport]]) -> NewMemory:
        recipe, shared = scene.recipe, scene.memory.get(SHARED)
        lr = recipe.learning_rate(scene.round, 0.5)

        def advance(report: UpdateReport, name: str, index: Any, control: Any, moved: Any) -> Any:
            mean = 0 if shared is None else shared[name][index]
            return control - mean + moved / (sgd_reach(recipe, report.steps) * lr) if lr else control

        return advanced_boards(scene, reports(), advance)


@dataclass(frozen=True)
class FedDyn(Strategy):
    """Board i adds −h_i and α·(w − x) to its gradients, h_i ← h_i + α·(x − y_i), and the model is the mean less h/α,
    where h is the mean of all h_i (Alg. 1)."""

    alpha: float = FedDynOptions.alpha

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        return replace(recipe, drift=True, proximal=self.alpha)

    def extract(self, cut: Cut) -> Submodel:
        own = cut.scene.memory.get(OWN + cut.turn.device, {})
        return with_drift(super().extract(cut), {n: -v for n, v in own.items()})

    def close(
        self, fold: Fold, scene: Scene, rate: float, reports: Callable[[], Iterator[tuple[UpdateReport, Submodel]]]
    ) -> RoundClosing:
        closing = super().close(fold, scene, rate, reports)
        counted = (report for report, _ in reports() if report.cut.turn.device not in closing.rejected)
        memories = advanced_boards(scene, counted, lambda *a: a[-2] + self.alpha * a[-1])
        model = dict(closing.model)
        for n, h in memories.get(SHARED, {}).items():
            model[n] = np.where(fold.mass(n) > 0, model[n] - h / np.float32(self.alpha), model[n])
        return replace(closing, model=model, memories=memories)


@dataclass(frozen=True)
class FedCm(ServerRate):
    """Boards step along α·g + (1 − α)·Δ, where Δ is the fleet's last move by step and learning rate (arXiv 2106.10874).
    They do so with the learning rate α·lr and the drift (1 − α)/α·Δ."""

    alpha: float = FedCmOptions.alpha

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        return replace(super().recipe(recipe, turn), lr=recipe.lr * self.alpha)

    def extract(self, cut: Cut) -> Submodel:
        recipe = cut.scene.recipe
        # By the board's own steps, so that it goes as far along the fleet's last move as any other.
        share = (1 - self.alpha) / self.alpha / sgd_reach(recipe, recipe.steps(cut.turn.samples))
        drift = {n: v * np.float32(share) for n, v in cut.scene.memory.get(SHARED, {}).items()}
        return with_drift(super().extract(cut), drift)

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[UpdateReport]]) -> NewMemory:
        lr, mean = scene.recipe.learning_rate(scene.round, 0.5), fold.close()[0]
        names = [t.name for t in scene.architecture.trainable]
        return {SHARED: {n: np.asarray((scene.model[n] - mean[n]) / np.float32(lr)) for n in names}} if lr else {}


def _composed(kind: Callable[..., Strategy], options_kind: type[Any], inputs: str, job: Job) -> Strategy:
    """A preset's strategy. Raises `ConfigError` if it needs boards that train by SGD, whose moves are gradients."""
    options = dict(vars(read_options(job, options_kind)))
    if kind is not FedDyn and job.recipe.optimizer != "sgd":
        what, expected = ("job", "recipe", "optimizer"), "sgd, whose moves are gradients"
        raise ConfigError(what, expected=expected, got=job.recipe.optimizer)
    allocator = density_allocator(job, options.pop("densities"), default=(1.0,))
    return kind(job.strategy, inputs=inputs, aggregator=Mean(weighting="uniform"), allocator=allocator, **options)


scaffold = partial(_composed, Scaffold, ScaffoldOptions, "updates")
feddyn = partial(_composed, FedDyn, FedDynOptions, "updates")
fedcm = partial(_composed, FedCm, FedCmOptions, "sum")


def sgd_reach(recipe: Recipe, steps: int) -> float:
    """How far a constant gradient of 1 moves by SGD in some steps at a learning rate of 1; K without momentum."""
    return free_steps(steps, recipe.momentum) / (1 - recipe.momentum)


def with_drift(submodel: Submodel, drift: Tensors) -> Submodel:
    """A submodel with its part of a drift in global coordinates."""
    return replace(submodel, drift={n: v[mesh(submodel.selection.maps(n))] for n, v in drift.items()})


def advanced_boards(
    scene: Scene, reports: Iterable[UpdateReport], advance: Callable[[UpdateReport, str, Any, Any, Any], Any]
) -> NewMemory:
    """The memory of boards after their updates, and its mean over all boards that have ever handed one in.

    `advance` takes an update, a tensor's name, the index of the elements that the board holds, what is remembered of
    them, and how far they moved, x − y. Elements that it lacks keep their values.
    """
    known, memories = {name for name in scene.memory if name.startswith(OWN)}, NewMemory()
    sums = {n: len(known) * v.astype(np.float64) for n, v in scene.memory.get(SHARED, {}).items()}
    for report in reports:
        trained, key = report.trained, OWN + report.cut.turn.device
        own = memories[key] = {t.name: np.zeros(t.shape, np.float32) for t in scene.architecture.trainable}
        for n, before in scene.memory.get(key, {}).items():
            own[n] += before
            sums[n] -= before
        for n, value in own.items():
            index, sent, y = mesh(trained.selection.maps(n)), report.sent.tensors[n], trained.tensors[n]
            following = advance(report, n, index, value[index], sent.astype(np.float64) - y)
            value[index] = np.where(trained.mask.get(n, True), following, value[index])
            sums[n] = sums.get(n, 0) + value
    count = len(known | memories.keys())
    return memories | {SHARED: {n: np.asarray(v / count, np.float32) for n, v in sums.items()}} if count else memories
