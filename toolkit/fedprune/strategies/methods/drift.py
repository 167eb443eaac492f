"""SCAFFOLD (Karimireddy et al. 2020), FedDyn (Acar et al. 2021) and FedCM (Xu et al. 2021): boards add a term to their
gradients.

The server holds all of their state, and sends each board its term as `Submodel.drift`. `docs/strategies/drift.md` has
equations, readings and options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedprune.aggregation.fold import Fold
from fedprune.aggregation.update_sums import free_steps
from fedprune.core.errors import ConfigError
from fedprune.core.settings import bounded
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors, mesh
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
        return advanced_boards(scene, reports(), self.next_control)

    def next_control(self, report: UpdateReport, name: str, control: Any, moved: Any) -> Any:
        """The next c_i of a tensor where the board holds it, from c_i and x − y_i."""
        scene = report.cut.scene
        shared = scene.memory.get(SHARED)
        mean = 0 if shared is None else shared[name][mesh(report.trained.selection.maps(name))]
        reach = sgd_reach(scene.recipe, report.steps) * scene.recipe.learning_rate(report.cut.turn.round, 0.5)
        return control - mean + moved / reach if reach else control


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
        memories = advanced_boards(scene, counted, lambda _report, _name, h, moved: h + self.alpha * moved)
        moved = {n: closing.model[n] - v / np.float32(self.alpha) for n, v in memories.get(SHARED, {}).items()}
        return replace(closing, model=closing.model | held(fold, moved, closing.model), memories=memories)


@dataclass(frozen=True)
class FedCm(ServerRate):
    """Boards step along α·g + (1 − α)·Δ, where Δ is the fleet's last move by step and learning rate (Alg. 2). They do
    so with the learning rate α·lr and the drift (1 − α)/α·Δ."""

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
        zeros = {t.name: np.zeros(t.shape, np.float32) for t in scene.architecture.trainable}
        before = scene.memory.get(SHARED, zeros)
        moved = {n: (scene.model[n] - mean[n]) / np.float32(lr) if lr else v for n, v in before.items()}
        return {SHARED: held(fold, moved, before)}


def scaffold(job: Job) -> Strategy:
    options = read_options(job, ScaffoldOptions)
    return _composed(Scaffold(job.strategy, inputs="updates", server_lr=options.server_lr), job, options.densities)


def feddyn(job: Job) -> Strategy:
    options = read_options(job, FedDynOptions)
    return _composed(FedDyn(job.strategy, inputs="updates", alpha=options.alpha), job, options.densities)


def fedcm(job: Job) -> Strategy:
    options = read_options(job, FedCmOptions)
    strategy = FedCm(job.strategy, inputs="sum", server_lr=options.server_lr, alpha=options.alpha)
    return _composed(strategy, job, options.densities)


def _composed(strategy: Strategy, job: Job, densities: tuple[Any, ...]) -> Strategy:
    """The preset of a strategy. Raises `ConfigError` if boards don't train by SGD, whose moves are gradients."""
    if isinstance(strategy, ServerRate) and job.recipe.optimizer != "sgd":
        path, got = ("job", "recipe", "optimizer"), repr(job.recipe.optimizer)
        raise ConfigError(f"{job.strategy} reads gradients from moves", path=path, expected="'sgd'", got=got)
    allocator = density_allocator(job, densities, default=(1.0,))
    return replace(strategy, aggregator=Mean(weighting="uniform"), allocator=allocator)


def sgd_reach(recipe: Recipe, steps: int) -> float:
    """How far a constant gradient of 1 moves by SGD in some steps at a learning rate of 1; K without momentum."""
    return free_steps(steps, recipe.momentum) / (1 - recipe.momentum)


def with_drift(submodel: Submodel, drift: Tensors) -> Submodel:
    """A submodel with its part of a drift in global coordinates."""
    selection: Selection = submodel.selection
    return replace(submodel, drift={n: v[mesh(selection.maps(n))] for n, v in drift.items()})


def held(fold: Fold, tensors: Tensors, otherwise: Tensors) -> Tensors:
    """Tensors where a round's updates hold their elements, and others elsewhere."""
    return {n: np.where(fold.mass(n) > 0, v, otherwise[n]) for n, v in tensors.items()}


def advanced_boards(
    scene: Scene, reports: Iterable[UpdateReport], advance: Callable[[UpdateReport, str, Any, Any], Any]
) -> NewMemory:
    """The memory of boards after their updates, and its mean over all boards that have ever handed one in.

    `advance` takes an update, a tensor's name, what is remembered of the elements that the board holds, and how far
    they moved, x − y. Elements that it lacks keep their values.
    """
    shapes = {t.name: t.shape for t in scene.architecture.trainable}
    known, memories = {name for name in scene.memory if name.startswith(OWN)}, NewMemory()
    sums = {n: len(known) * v.astype(np.float64) for n, v in scene.memory.get(SHARED, {}).items()}
    for report in reports:
        trained, name = report.trained, OWN + report.cut.turn.device
        before = scene.memory.get(name, {})
        own = {n: np.array(before.get(n, np.zeros(shape)), np.float64) for n, shape in shapes.items()}
        for n, value in own.items():
            index, sent, y = mesh(trained.selection.maps(n)), report.sent.tensors[n], trained.tensors[n]
            # A tensor that no update carries is the server's own, while a codec may have changed what was sent.
            if not np.array_equal(y, scene.model[n][index]):
                following = advance(report, n, value[index], sent.astype(np.float64) - y)
                value[index] = np.where(trained.mask.get(n, True), following, value[index])
            own[n] = value.astype(np.float32)
            sums[n] = sums.get(n, 0) + own[n] - before.get(n, np.float32(0))
        memories[name] = own
    count = len(known | memories.keys())
    return memories | {SHARED: {n: (v / count).astype(np.float32) for n, v in sums.items()}} if count else memories
