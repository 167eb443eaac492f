"""What leaves a board: no longer than the bound whatever was trained, noised as asked, untouched where nothing is."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.aggregation.fold import Fold, Rule
from fedprune.core.errors import TrainingError
from fedprune.model.selection import Selection, Tensors
from fedprune.updates.clipped_noise import GaussianNoise, add_noise, update_norm
from fedprune.updates.privacy_cost import delta_for, epsilon_for, max_cost
from support.fakes.strategy_rounds import NET, TRAINED

pytestmark = pytest.mark.board

NONE = GaussianNoise.from_key("unused")


def tensors(seed: int, scale: float = 0.1, widths: tuple[int, ...] = NET.sizes) -> Tensors:
    random = np.random.default_rng(seed)
    out = {n: (scale * random.standard_normal(s)).astype(np.float32) for n, s in NET.shapes(widths).items()}
    return out | {"norm.variance": np.abs(out["norm.variance"])}


def distance(update: Tensors, received: Tensors) -> float:
    return math.sqrt(sum(float(((update[n].astype(np.float64) - received[n]) ** 2).sum()) for n in TRAINED))


def test_nothing_to_clip_and_no_noise_leaves_every_bit() -> None:
    update, received = tensors(1), tensors(2)
    out = add_noise(update, received, TRAINED, 1e6, 0.0, NONE)
    assert list(out) == list(update)
    for name in update:
        assert out[name].tobytes() == (update if name in TRAINED else received)[name].tobytes(), name


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.floats(1e-2, 1e2))
def test_what_is_too_long_is_as_long_as_the_bound_and_points_the_same_way(seed: int, clip: float, scale: float) -> None:
    update, received = tensors(seed, scale), tensors(seed + 1)
    before, after = distance(update, received), add_noise(update, received, TRAINED, clip, 0.0, NONE)
    rounding = 1e-6 * scale * math.sqrt(sum(v.size for v in update.values()))
    assert distance(after, received) <= clip + rounding
    for name in TRAINED:
        expected = received[name] + min(1.0, clip / before) * (update[name].astype(np.float64) - received[name])
        assert np.allclose(after[name], expected, rtol=1e-6, atol=1e-6 * (1 + scale))


@given(st.lists(st.floats(-(2.0**50), 2.0**50, width=32), min_size=1, max_size=50))
def test_a_norm_is_never_said_to_be_smaller_than_it_is(values: list[float]) -> None:
    after = {"a": np.array(values, np.float32)}
    exact = math.sqrt(math.fsum(float(v) ** 2 for v in after["a"]))
    assert exact <= update_norm(after, {"a": np.zeros(len(values), np.float32)}, ["a"]) <= exact * (1 + 1e-8)


@settings(deadline=None)
@given(st.data())
def test_a_board_changes_a_rounds_sum_by_no_more_than_the_bound(data: st.DataObject) -> None:
    """Sensitivity: with or without a board's samples, the sum over its coordinates differs by at most the clip."""
    seed = data.draw(st.integers(0, 2**31), "seed")
    clip = data.draw(st.floats(0.01, 4.0), "clip")
    rule: Rule = data.draw(st.sampled_from(["coverage", "fill"]), "rule")
    ranks = tuple(np.array(data.draw(st.permutations(range(n)), "rank")) for n in NET.sizes)
    widths = data.draw(st.lists(st.tuples(*(st.integers(1, n) for n in NET.sizes)), min_size=1, max_size=4))
    full_selection = Selection.of(NET, NET.sizes, ranks)
    base = tensors(seed)
    folds = [Fold(NET, base, rule=rule), Fold(NET, base, rule=rule)]
    for place, board_widths in enumerate(widths):
        selection = full_selection.with_widths(board_widths)
        received = {n: np.ascontiguousarray(v) for n, v in selection.gather(base).items()}
        trained = {
            n: v + u
            for (n, v), u in zip(received.items(), tensors(seed + place + 1, 0.5, board_widths).values(), strict=True)
        }
        update = add_noise(trained, received, TRAINED, clip, 0.0, NONE)
        folds[0].add(selection, update, 1)
        folds[1].add(selection, received if place == 0 else update, 1)  # the first board has no samples
    models = [fold.close()[0] for fold in folds]
    mass = {n: len(widths) if rule == "fill" else folds[0].mass(n) for n in TRAINED}
    apart = 0.0
    for name in TRAINED:
        difference = (models[0][name].astype(np.float64) - models[1][name]) * mass[name]
        apart = math.hypot(apart, float(np.linalg.norm(difference)))
    assert apart <= clip + 1e-4
    for name in ("norm.mean", "norm.variance"):
        assert models[0][name].tobytes() == base[name].tobytes(), "statistics stay as they were"


def test_noise_is_added_to_every_element_as_strong_as_asked() -> None:
    size = 300_000
    received: dict[str, Any] = {"a": np.linspace(-1, 1, size, dtype=np.float32)}
    trained = {"a": received["a"] + np.float32(0.01)}
    out = add_noise(trained, received, {"a"}, 1.0, 0.25, GaussianNoise.from_key("strength"))
    noise = out["a"].astype(np.float64) - received["a"] - 0.01 / update_norm(trained, received, ["a"])
    assert abs(noise.mean()) < 5 * 0.25 / math.sqrt(size)
    assert abs(noise.std() / 0.25 - 1) < 5 / math.sqrt(2 * size)
    ordered = np.sort(noise[::10] / 0.25)
    normal = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in ordered])
    steps = np.arange(1, ordered.size + 1) / ordered.size
    assert np.max(np.abs(steps - normal)) < 1.95 / math.sqrt(ordered.size) + 1 / ordered.size


def test_an_update_that_is_not_finite_is_refused() -> None:
    update, received = tensors(1), tensors(2)
    for wrong in (np.nan, np.inf):
        update["first.weight"][0, 0] = wrong
        with pytest.raises(TrainingError, match="finite"):
            add_noise(update, received, TRAINED, 1.0, 1.0, NONE)


MANY = 200_000
DRAWN = GaussianNoise.from_key("the tests' own").draw(MANY)


def test_its_distribution_is_a_standard_normals() -> None:
    normal = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in np.sort(DRAWN)])
    steps = np.arange(MANY + 1) / MANY
    gap = max(np.max(steps[1:] - normal), np.max(normal - steps[:-1]))
    assert gap < 1.95 / math.sqrt(MANY)  # Kolmogorov and Smirnov's statistic at 0.1 %


def test_deviates_are_not_correlated() -> None:
    for lag in (1, 2, MANY // 2, MANY // 2 + 1):
        assert abs(np.mean(DRAWN[lag:] * DRAWN[:-lag])) < 5 / math.sqrt(MANY - lag), lag


def test_a_key_gives_the_same_deviates_and_another_one_others() -> None:
    assert np.array_equal(GaussianNoise.from_key(1, "a").draw(9), GaussianNoise.from_key(1, "a").draw(9))
    assert not np.array_equal(GaussianNoise.from_key(1, "a").draw(9), GaussianNoise.from_key(1, "b").draw(9))
    assert not np.array_equal(GaussianNoise.from_system().draw(9), GaussianNoise.from_system().draw(9))
    source = GaussianNoise.from_key(2)
    assert not np.array_equal(source.draw(9), source.draw(9))


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        GaussianNoise(b"short")


@pytest.mark.once  # boards don't have the library
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("cost", [1e-9, 1e-3, 1.0, 100.0, 500.0])
@pytest.mark.parametrize("target_delta", [0.1, 1e-9])
def test_it_says_what_dp_accounting_says(cost: float, target_delta: float) -> None:
    library = pytest.importorskip("dp_accounting", exc_type=ImportError)
    assert epsilon_for(cost, target_delta) == pytest.approx(
        library.get_epsilon_gaussian(cost**-0.5, target_delta), rel=1e-6, abs=1e-12
    )


@pytest.mark.once
@pytest.mark.parametrize("cost", [1e4, 1e6])
def test_where_floats_end_it_says_too_much_and_not_too_little(cost: float) -> None:
    exact = pytest.importorskip("dp_accounting", exc_type=ImportError).get_epsilon_gaussian(cost**-0.5, 1e-5)
    assert exact <= epsilon_for(cost, 1e-5) <= exact + 1


def test_it_is_below_the_bounds_by_moments_that_are_published() -> None:
    for multiplier, rounds in ((1.0, 1), (1.1, 60), (4.0, 1000)):
        cost = rounds / multiplier**2
        # Renyi: α/(2z²) a release (Mironov 2017, Proposition 7), turned into ε as Opacus does (Balle et al. 2020).
        orders = [1 + x / 10 for x in range(1, 1000)]
        renyi = min(
            a * cost / 2 + math.log1p(-1 / a) - (math.log(1e-5) + math.log(a)) / (a - 1) for a in orders if a > 1
        )
        assert 0.7 * renyi < epsilon_for(cost, 1e-5) <= renyi + 1e-9


@given(st.floats(1e-6, 1e5), st.floats(1e-12, 0.5))
def test_what_it_says_is_promised_and_grows_with_what_is_spent(cost: float, target_delta: float) -> None:
    epsilon_bound = epsilon_for(cost, target_delta)
    assert delta_for(cost, epsilon_bound) <= target_delta
    assert epsilon_for(1.01 * cost, target_delta) >= epsilon_bound


@given(st.floats(1e-3, 1e4), st.floats(1e-12, 0.1))
def test_a_budget_is_a_cost_and_back(budget: float, target_delta: float) -> None:
    cost_limit = max_cost(budget, target_delta)
    assert epsilon_for(cost_limit, target_delta) <= budget < epsilon_for(cost_limit * (1 + 1e-6) + 1e-12, target_delta)
