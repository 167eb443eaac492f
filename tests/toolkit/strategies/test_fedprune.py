"""The preset `fedprune`: ranks that stay, and a recipe that leaves the job's own settings alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedprune.aggregation.fold import Fold
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture, TensorKind, widths_at
from fedprune.model.features import OPTIMIZERS
from fedprune.model.nesting import nest_widths
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies import compose
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.importance.scoring import magnitude_scores, rank_channels
from fedprune.strategies.methods.fedprune import FedPrune
from fedprune.strategies.shared_core import SharedCore
from fedprune.strategies.values import Scene, SelfDistillation, Turn
from support.nets.drawn_models import architectures, model, seeds

pytestmark = pytest.mark.board


def job(options: dict[str, Any] | None = None, **settings: Any) -> Job:
    return Job(strategy="fedprune", options=options or {}, **settings)


@given(data=st.data(), seed=seeds)
def test_ranks_are_those_of_the_first_model_whatever_follows(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    strategy, start = compose(job({"ranking": "magnitude"})), model(architecture, seed)
    first = Scene(architecture, 0, 1, start)
    chosen = strategy.rank(first).ranks
    memory = strategy.learn(first, Fold(architecture, start), lambda: iter(()))
    later = Scene(architecture, 0, 2, model(architecture, seed + 1), memory)

    assert all(
        np.array_equal(a, b) for a, b in zip(chosen, rank_channels(magnitude_scores(architecture, start)), strict=True)
    )
    assert all(np.array_equal(a, b) for a, b in zip(strategy.rank(later).ranks, chosen, strict=True))
    assert strategy.learn(later, Fold(architecture, start), lambda: iter(())) == {}
    Selection.of(
        architecture, architecture.sizes, strategy.rank(later).ranks
    )  # which checks that they are permutations


@given(data=st.data(), seed=seeds)
@pytest.mark.parametrize("trained", [False, True])
def test_a_model_that_was_just_made_is_started_nested_and_a_trained_one_as_it_is(
    trained: bool, data: st.DataObject, seed: int
) -> None:
    architecture, start = first_model(data, seed, trained=trained)

    def nest(*densities: float) -> Tensors:
        return nest_widths(architecture, start, [widths_at(architecture, d) for d in densities])

    def starting_model(recipe: Recipe | None = None, **options: Any) -> Tensors:
        return compose(job(options, recipe=recipe or Recipe())).begin(architecture, start)

    assert same(starting_model(ranking="nested", dropout=[0.25, 0.5]), nest(0.25, 0.5))
    assert same(starting_model(ranking="nested", core=0, densities=[1, 0.5]), nest(0.5))
    recipe = Recipe(ordered_dropout=(0.5,))
    assert same(starting_model(recipe=recipe), start if trained else nest(0.5))
    assert same(starting_model(core=0, densities=[0.5]), start if trained else nest(0.5)), "all boards are alike"
    for options in ({"ranking": "ordered"}, {"ranking": "magnitude"}, {"densities": [1.0]}):
        assert starting_model(**options, core=0) is start
    assert starting_model() is starting_model(ranking="nested") is start, "the core is known when boards are"
    coreless = compose(job({"ranking": "nested"}))
    assert isinstance(coreless, FedPrune)
    assert same(coreless.without_core().begin(architecture, start), nest(0.25, 0.5, 0.75))
    chosen = compose(job()).rank(Scene(architecture, 0, 1, start)).ranks
    first = (
        rank_channels(magnitude_scores(architecture, start)) if trained else [np.arange(n) for n in architecture.sizes]
    )
    assert all(np.array_equal(a, b) for a, b in zip(chosen, first, strict=True))
    always = compose(job({"ranking": "nested"})).rank(Scene(architecture, 0, 1, start)).ranks
    assert all(np.array_equal(a, np.arange(len(a))) for a in always)


@given(data=st.data(), seed=seeds)
@pytest.mark.parametrize(("ranking", "trained"), [("auto", False), ("nested", True)])
def test_a_core_begins_as_a_net_of_its_widths(ranking: str, trained: bool, data: st.DataObject, seed: int) -> None:
    """Initial weights of n inputs have a variance of 1 / n."""
    architecture, start = first_model(data, seed, trained=trained)
    core, own_order = widths_at(architecture, 0.5), tuple(np.arange(n) for n in architecture.sizes)
    brought_ranks = tuple(np.random.default_rng(seed).permutation(n) for n in architecture.sizes)
    begun = compose(job({"ranking": ranking})).start_core(Scene(architecture, 0, 1, start, ranks=brought_ranks), core)
    assert begun is not None

    order = own_order if ranking == "nested" else brought_ranks
    ranks = compose(job()).rank(Scene(architecture, 0, 1, *begun)).ranks
    assert all(np.array_equal(a, b) for a, b in zip(ranks, order, strict=True)), "by which the core was cut"
    selection = Selection.of(architecture, core, order)
    cut = selection.gather(start)
    is_scaled = all(t.kind is not TensorKind.STAT_VAR for t in architecture.tensors)
    for layer in architecture.layers:
        if is_scaled and (layer.op, layer.output_axis) != ("Conv", 1):  # no file has such a layer
            inputs = [v[layer.weight].size / v[layer.weight].shape[layer.output_axis] for v in (start, cut)]
            cut[layer.weight] = cut[layer.weight] * np.float32((inputs[0] / inputs[1]) ** 0.5)
    assert same(selection.gather(begun[0]), cut)
    if order is own_order:
        silent = nest_widths(architecture, start, [core])
        assert all(np.array_equal(begun[0][n][o := ~selection.coverage_mask(n)], v[o]) for n, v in silent.items())


@pytest.mark.parametrize(("ranking", "trained"), [("auto", True), ("ordered", False), ("magnitude", False)])
@given(data=st.data(), seed=seeds)
def test_what_a_model_knows_is_not_lost_to_a_core(ranking: str, trained: bool, data: st.DataObject, seed: int) -> None:
    architecture, start = first_model(data, seed, trained=trained)
    assert compose(job({"ranking": ranking})).start_core(Scene(architecture, 0, 1, start), architecture.sizes) is None


def first_model(data: st.DataObject, seed: int, *, trained: bool) -> tuple[Architecture, Tensors]:
    """A net with normalisations, as it was made or trained before."""
    architecture = data.draw(architectures())
    start = fresh(architecture, seed)
    assume(any(t.kind is TensorKind.NORM_BIAS for t in architecture.tensors))
    if trained:
        start |= {t.name: start[t.name] + 1 for t in architecture.tensors if t.kind is TensorKind.NORM_BIAS}
    return architecture, start


def fresh(architecture: Architecture, seed: int) -> Tensors:
    """Normal weights; norms and statistics as they are made."""
    constant = {
        TensorKind.NORM_BIAS: 0.0,
        TensorKind.STAT_MEAN: 0.0,
        TensorKind.STAT_VAR: 1.0,
        TensorKind.NORM_SCALE: 1,
    }
    drawn = np.random.default_rng(seed)
    return {
        t.name: np.full(t.shape, constant[t.kind], np.float32)
        if t.kind in constant
        else drawn.standard_normal(t.shape).astype(np.float32)
        for t in architecture.tensors
    }


def same(a: Tensors, b: Tensors) -> bool:
    return all(np.array_equal(a[n], b[n]) for n in b)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_a_core_narrower_submodels_take_larger_steps_except_with_sgd(optimizer: str) -> None:
    def rates(**options: Any) -> list[float]:
        strategy, recipe = compose(job(options)), Recipe(lr=0.1, optimizer=optimizer)
        turns = (Turn(0, 1, "a", (3,), 0.5, macs_share=share) for share in (1.0, 0.25, 0.04))
        return [strategy.recipe(recipe, turn).lr for turn in turns]

    assert rates() == pytest.approx([0.1] * 3 if optimizer == "sgd" else [0.1, 0.2, 0.5])
    assert rates(core=0) == rates(dropout=[0.5]) == [0.1] * 3


def test_the_average_of_a_young_job_forgets_its_first_rounds_sooner() -> None:
    def factors(average: float) -> list[float]:
        strategy = compose(job({"average": average}))
        return [strategy.recipe(Recipe(), Turn(0, number, "a", (3,))).average for number in range(1, 101)]

    assert factors(0.0) == [0.0] * 100
    assert (grown := factors(0.85)) == sorted(grown)
    assert (0 < grown[0] < grown[5] < 0.7, set(grown[25:])) == (True, {0.85})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_only_with_sgd_the_servers_model_has_momentum_unless_an_option_says_it(optimizer: str) -> None:
    def momentum(**options: Any) -> float:
        aggregator = compose(job(options, recipe=Recipe(optimizer=optimizer))).aggregator
        assert isinstance(aggregator, Mean)
        return aggregator.server_momentum

    assert momentum() == (0.5 if optimizer == "sgd" else 0.0)
    assert momentum(server_momentum=0.7) == 0.7


def test_the_server_is_asked_to_distil_at_the_widths_of_steps_or_those_of_boards() -> None:
    def distillation(recipe: Recipe | None = None, **options: Any) -> SelfDistillation | None:
        return compose(job(options, recipe=recipe or Recipe())).distillation

    assert distillation(distill=0) is None
    assert distillation(distill=7, dropout=[0.5]) == SelfDistillation(7, (0.5,), 1e-3)
    assert distillation(Recipe(ordered_dropout=(0.3, 1.0))) == SelfDistillation(40, (0.3,), 1e-3)
    assert distillation() == distillation(core=0, densities=[1, 0.5]) == SelfDistillation(40, (), 1e-3)
    assert distillation(Recipe(personal=("@head",))) is None  # the server's own head answers to nothing


def test_most_of_the_fleet_shares_a_core_unless_options_say_otherwise() -> None:
    def core(recipe: Recipe | None = None, **options: Any) -> SharedCore | None:
        return compose(job(options, recipe=recipe or Recipe())).core

    assert core() == core(Recipe(loss="mse")) == core(mixup=0.2) == SharedCore(0.75)
    assert core(core=0.5) == SharedCore(0.5)
    assert core(Recipe(ordered_dropout=(0.5,))) is core(dropout=[0.5]) is core(core=0) is core(arrivals=2) is None
    assert compose(job(schedule={"kind": "async"})).core is compose(job(schedule={"kind": "semi-async"})).core is None


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"averag": 0.5}, "averag"),
        ({"average": 1.0}, "average"),
        ({"mixup": 1e-4}, "mixup"),
        ({"ranking": "curvature"}, "ranking"),
        ({"dropout": ["half"]}, "dropout"),
        ({"ranking": "nested", "core": 0}, "ranking"),
        ({"core": 0.5, "dropout": [0.5]}, "core: .*dropout"),
        ({"core": 0.5, "arrivals": 2}, "core: .*asynchronous.*`arrivals`"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        compose(job(options))


@given(data=st.data(), seed=seeds)
def test_ranks_of_another_description_of_the_model_are_settled_anew(data: st.DataObject, seed: int) -> None:
    old, new = data.draw(architectures()), data.draw(architectures())
    assume(old.digest != new.digest)
    strategy, start = compose(job({"ranking": "magnitude"})), model(new, seed)
    first = Scene(old, 0, 1, model(old, seed))
    memory = strategy.learn(first, Fold(old, first.model), lambda: iter(()))
    upgraded = Scene(new, 0, 2, start, memory)
    chosen = strategy.rank(upgraded).ranks

    assert all(np.array_equal(a, b) for a, b in zip(chosen, rank_channels(magnitude_scores(new, start)), strict=True))
    relearnt = strategy.learn(upgraded, Fold(new, start), lambda: iter(()))
    later = Scene(new, 0, 3, model(new, seed + 1), memory | relearnt)
    assert all(np.array_equal(a, b) for a, b in zip(strategy.rank(later).ranks, chosen, strict=True))


def test_a_jobs_own_recipe_comes_before_options_and_these_before_what_is_usual() -> None:
    def device_recipe(job_recipe: Recipe, **options: Any) -> Recipe:
        return compose(job(options, recipe=job_recipe)).recipe(job_recipe, Turn(0, 1, "a", (3,)))

    assert device_recipe(Recipe()).mixup == 0
    assert device_recipe(Recipe(average=0.9)).average == 0.9
    assert (device_recipe(Recipe(), mixup=0.3).mixup, device_recipe(Recipe(mixup=0.4), mixup=0.3).mixup) == (0.3, 0.4)
    assert (device_recipe(Recipe()).clip_norm, device_recipe(Recipe(clip_norm=3.0), clip_norm=0.5).clip_norm) == (
        1.0,
        3.0,
    )
    assert (device_recipe(Recipe()).blend, device_recipe(Recipe(), average=0.0, blend=0.2).blend) == (0.5, 0.0)
