"""What presets are made of: widths, windows, recipes, own parts, and the names of their settings."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.aggregation.fold import Fold
from fedprune.coordination import State, SynchronousCoordinator
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.model.architecture import widths_at
from fedprune.model.element_mask import apply_mask
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.strategies.allocation import Fixed, Tiers
from fedprune.strategies.methods.fedavg import FedAvg, fedavg
from fedprune.strategies.methods.heterofl import LEVELS, FedRolex
from fedprune.strategies.methods.history import History
from fedprune.strategies.methods.robust import RobustAggregator
from fedprune.strategies.methods.subflot import SubFlot
from fedprune.strategies.presets import PRESETS, compose
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, NewMemory, PastUpdate, RoundClosing, Scene, Submodel, Turn, UpdateReport
from fedprune.updates.privacy import Privacy
from support.fakes.strategy_reports import scene
from support.fakes.strategy_rounds import identical
from support.fakes.tiny_job import ARCHITECTURE
from support.nets.drawn_models import architectures, model, seeds, selections

pytestmark = pytest.mark.board


def job(strategy: str, **options: Any) -> Job:
    return Job(strategy=strategy, options=options)


def turn(density: float = 1.0, round_: int = 1) -> Turn:
    return Turn(0, round_, "d", (), density)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_composes_and_takes_robust_means(name: str) -> None:
    strategy = compose(job(name, robust={"centre": "median"}))
    assert strategy.name == name
    assert isinstance(strategy.aggregator, RobustAggregator)
    assert strategy.aggregator.inner == compose(job(name)).aggregator


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pr-fl", {"shares": [1], "densities": [1, 0.5]}),
        ("heterofl", {"densities": [1.0, 0.0005]}),
        ("fedper", {"personal": []}),
    ],
)
def test_settings_out_of_range_are_named(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}|expected one per density"):
        compose(job(name, **options))


def test_widths_come_from_the_option_then_the_job_then_the_preset() -> None:
    for name in ("fedavg", "fedprox", "heterofl", "fedrolex", "fedper", "local", "history", "ca-hfp"):
        assert compose(job(name, densities=[1, 0.5])).allocator == Tiers((1, 0.5))
        assert compose(Job(strategy=name, density=0.3)).allocator == Fixed(0.3)
    assert compose(job("fedavg")).allocator == Fixed(1.0, whole=True)
    assert compose(job("heterofl")).allocator == Tiers(LEVELS)
    assert compose(job("ca-hfp")).allocator is None


def test_heterofl_s_aids_follow_the_width() -> None:
    wide, narrow = (compose(job("heterofl")).recipe(Recipe(lr=1.0), turn(d)) for d in (1.0, 0.25))
    assert (wide.scale, narrow.scale) == (1.0, 4.0)
    for recipe in (wide, narrow):
        assert (recipe.calibrate, recipe.mask_absent_classes, recipe.clip_norm) == (True, True, 1.0)
    assert not compose(job("heterofl")).recipe(Recipe(loss="mse"), turn()).mask_absent_classes


def test_a_weighting_that_nobody_knows_is_refused_before_it_counts() -> None:
    """An aggregator of one's own says by what devices count; a misspelt word would silently mean samples."""
    strategy = Job(strategy="support.fakes.tiny_job:scheduled", options={"schedule": {}, "weighting": "sample"})
    with pytest.raises(ConfigError, match="'sample'"):
        SynchronousCoordinator(strategy, ARCHITECTURE, State(model="m"))


@pytest.mark.parametrize("name", ["heterofl", "fedrolex"])
def test_adam_s_weight_decay_leaves_no_rows_to_tell_apart(name: str) -> None:
    def compose_preset(recipe: Recipe, **options: Any) -> None:
        compose(Job(strategy=name, options=options, recipe=recipe))

    decays = Recipe(optimizer="adam", weight_decay=0.01)
    with pytest.raises(ConfigError, match="label_rows"):
        compose_preset(decays)
    compose_preset(decays, label_rows=False)
    for recipe in (Recipe(optimizer="adam"), Recipe(optimizer="adamw", weight_decay=0.01), Recipe(weight_decay=0.01)):
        compose_preset(recipe)


@given(st.data(), seeds, st.integers(1, 40))
def test_a_rolling_window_moves_on_and_narrow_ones_lie_in_wide_ones(
    data: st.DataObject, seed: int, round_: int
) -> None:
    architecture = data.draw(architectures())
    ranking = FedRolex(inputs="sum").rank(scene(architecture, model(architecture, seed), round=round_)).ranks
    windows = {d: Selection.of(architecture, widths_at(architecture, d), ranking) for d in (1.0, 0.5, 0.25)}
    for g, n in enumerate(architecture.sizes):
        for density, selection in windows.items():
            width = selection.widths[g]
            assert width == max(1, math.ceil(density * n))
            assert selection.ranks[g][:width].tolist() == [(round_ - 1 + j) % n for j in range(width)]


@given(st.data(), seeds, st.floats(0, 1))
def test_history_mixes_where_both_hold_a_coordinate(data: st.DataObject, seed: int, alpha: float) -> None:
    architecture = data.draw(architectures())
    now = model(architecture, seed)
    at = scene(architecture, now)
    selection, before = data.draw(selections(architecture)), data.draw(selections(architecture))
    history_model = model(architecture, seed + 1)
    cut = Cut(at, turn(), selection, past=PastUpdate(before, before.gather(history_model), round=1))
    offered = Submodel(selection, selection.gather(now))
    history = History(alpha=alpha, inputs="updates")
    for name, value in history.extract(cut).tensors.items():
        both = selection.gather({n: before.coverage_mask(n).astype(np.float32) for n in now})[name] > 0
        mixed = alpha * offered.tensors[name] + (1 - alpha) * selection.gather(history_model)[name]
        assert np.allclose(value[both], mixed[both], atol=1e-6)
        assert value[~both].tobytes() == offered.tensors[name][~both].tobytes()
    assert identical(history.extract(Cut(at, turn(), selection)).tensors, offered.tensors)


@given(st.data(), seeds, st.booleans())
def test_of_masked_elements_a_history_knows_nothing(data: st.DataObject, seed: int, transported: bool) -> None:
    """A board that had 0 there has not learnt 0: the global model's own value is what it continues from."""
    architecture = data.draw(architectures())
    selection, now = data.draw(selections(architecture)), model(architecture, seed)
    bits = np.random.default_rng(seed)
    shapes = {t.name: selection.shapes()[t.name] for t in architecture.trainable}
    mask = {n: bits.random(shape) < 0.5 for n, shape in shapes.items()}
    past = PastUpdate(selection, apply_mask(mask, selection.gather(model(architecture, seed + 1))), mask)
    cut = Cut(scene(architecture, now), turn(), selection, past=past)
    offered = Submodel(selection, selection.gather(now))
    subflot, history = SubFlot(inputs="updates"), History(alpha=0.0, inputs="updates")
    for name, value in (subflot.resize_history(past, cut) if transported else history.extract(cut).tensors).items():
        active = mask.get(name, np.ones(value.shape, np.bool_))
        np.testing.assert_allclose(value, np.where(active, past.tensors[name], offered.tensors[name]), atol=1e-6)


def test_fedprox_pulls_and_fedavg_does_not() -> None:
    recipe = Recipe(lr=0.1)
    assert compose(job("fedprox", mu=0.3)).recipe(recipe, turn()).proximal == 0.3
    assert compose(job("fedavg")).recipe(recipe, turn()) == recipe
    assert compose(job("fedavg", lr_decay=0.5)).recipe(recipe, turn(round_=3)).lr == 0.025


# The presets that secure aggregation and shared noise go with, by docs/secure-aggregation.md and docs/privacy.md.
SUMS_ONLY = {"fedavg", "fedcm", "fedper", "fedprox", "fedprune", "heterofl", "fedrolex", "plain"}
OVERRIDES: dict[str, tuple[Callable[..., Any], bool]] = {
    "begin": (lambda self, architecture, model: model, True),
    "rank": (lambda self, scene: Strategy.rank(self, scene), True),
    "extract": (lambda self, cut: Strategy.extract(self, cut), True),
    "recipe": (lambda self, recipe, turn: replace(recipe, report_squares=True), False),
    "reconstruct": (lambda self, report: report.trained, False),
}


class Counting(FedAvg):
    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[UpdateReport]]) -> NewMemory:
        return {"rounds": {"count": np.array([scene.round], np.float32)}}


class Reading(FedAvg):
    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[UpdateReport]]) -> NewMemory:
        return {"steps": {r.device: np.array([r.steps], np.float32) for r in reports()}}


class Closing(FedAvg):
    def close(self, fold: Fold, scene: Scene, rate: float, updates: Any) -> RoundClosing:
        return self.aggregator.close(fold, scene, rate, updates)


class Passing(FedAvg):
    def close(self, fold: Fold, scene: Scene, rate: float, updates: Any) -> RoundClosing:
        return super().close(fold, scene, rate, updates)


def subclass(kind: type[FedAvg]) -> Callable[[Job], Strategy]:
    return lambda job: kind(**vars(fedavg(replace(job, strategy="fedavg"))) | {"name": job.strategy})


@pytest.mark.parametrize(
    ("name", "preset", "goes"),
    [(name, preset, name in SUMS_ONLY) for name, preset in sorted(PRESETS.items())]
    + [(name, subclass(type(name, (FedAvg,), {name: method})), goes) for name, (method, goes) in OVERRIDES.items()]
    + [
        (kind.__name__, subclass(kind), goes)
        for kind, goes in {Counting: True, Passing: True, Reading: False, Closing: False}.items()
    ],
)
@pytest.mark.parametrize("settings", [{"secure_aggregation": True}, {"privacy": Privacy(2.0, 1.5, "shared", 9)}])
def test_only_strategies_whose_methods_see_sums_go_with_secure_sums(
    name: str, preset: Callable[[Job], Strategy], goes: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, name, preset)
    options = {"label_rows": False} if name in ("heterofl", "fedrolex") else {}
    private_job = Job(strategy=name, options=options, **settings)
    with contextlib.nullcontext() if goes else pytest.raises(ConfigError, match=f"strategy {name}|squared gradients"):
        compose(private_job)
