"""CA-HFP's identities: nested masks, warm-up, scores, reconstruction, and what keeps its estimate."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.strategies import compose
from fedprune.strategies.channel_ranking import EVIDENCE
from fedprune.strategies.importance.gradient_stats import Evidence
from fedprune.strategies.importance.scoring import (
    channel_sums,
    curvature_scores,
    movement_scores,
    random_ranks,
    rank_channels,
)
from fedprune.strategies.methods.ca_hfp import ca_hfp
from fedprune.strategies.methods.fedavg import fedavg
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import NewMemory, Scene
from support.fakes.strategy_reports import close_fold, report, scene
from support.fakes.strategy_rounds import NET, Device, Play, identical
from support.fakes.tiny_job import ARCHITECTURE
from support.nets.drawn_models import architectures, model, perturb_submodel, seeds

pytestmark = pytest.mark.board


def strategy(**options: Any) -> Any:
    return ca_hfp(Job(strategy="ca-hfp", options=options))


def a_round(current_scene: Scene, scorer: Strategy, density: float, seed: int) -> tuple[NewMemory, Selection]:
    """One device of a density trains what the scorer ranks best; gives what the scorer remembers."""
    architecture = current_scene.architecture
    selection = Selection.of(architecture, widths_at(architecture, density), scorer.rank(current_scene).ranks)
    update = report(current_scene, selection, perturb_submodel(selection, dict(current_scene.model), seed), 5, steps=3)
    _, fold = close_fold(strategy().aggregator, current_scene, [update], evidence=scorer.observes_movement)
    return scorer.learn(current_scene, fold, lambda: iter([update])), selection


@given(st.data(), seeds)
def test_masks_are_nested_and_keep_what_the_ratio_says(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    score = data.draw(st.sampled_from(["curvature", "l1", "delta_w", "random"]))
    ranking = strategy(score=score).rank(scene(architecture, model(architecture, seed), round=2)).ranks
    outer_channels: set[tuple[int, int]] = {(g, c) for g, n in enumerate(architecture.sizes) for c in range(n)}
    for ratio in (0.0, 0.25, 0.5, 0.75, 0.9):
        selection = Selection.of(architecture, widths_at(architecture, 1 - ratio), ranking)
        assert selection.widths == tuple(max(1, math.ceil((1 - ratio) * n - 1e-9)) for n in architecture.sizes)
        narrower = {(g, int(c)) for g, r in enumerate(selection.ranks) for c in r[: selection.widths[g]]}
        assert narrower <= outer_channels
        outer_channels = narrower


@pytest.mark.parametrize("options", [{}, {"score": "l1"}, {"form": "signed"}])
def test_with_all_ratios_0_its_sums_are_fedavg_s_bits_in_any_order(options: dict[str, Any]) -> None:
    """Devices whose training doesn't depend on the channels' order: the models are FedAvg's, whatever the ranks."""
    fleet = {n: Device(weight=w) for n, w in (("a", 3), ("b", 10), ("c", 7))}
    expected = Play(fedavg(Job(strategy="fedavg")), model(NET, 1), fleet)
    got = Play(strategy(densities=[1.0], **options), model(NET, 1), fleet)
    orders = set()
    for _ in range(5):
        assert identical(got.play(), expected.play())
        orders.add(tuple(got.sent["a"].selection.ranks[0]))
    assert tuple(range(NET.sizes[0])) not in orders, "channels lay in another order"


@given(st.data(), seeds)
def test_warm_up_is_random_until_every_channel_was_trained(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    base = model(architecture, seed)
    scorer = strategy(densities=[0.5])
    memory: NewMemory = {}
    for t in range(1, 60):
        current_scene = scene(architecture, base, memory, round=t)
        evidence = memory.get(EVIDENCE)
        complete = evidence is not None and Evidence.from_tensors(architecture, evidence).is_complete
        ranking = scorer.rank(current_scene).ranks
        if complete:
            settled = Evidence.from_tensors(architecture, memory[EVIDENCE])
            expected = rank_channels(curvature_scores(architecture, base, settled))
        else:
            expected = random_ranks(architecture, 0, t)
        assert all(np.array_equal(a, b) for a, b in zip(ranking, expected, strict=True))
        if complete:
            return
        learnt, _ = a_round(current_scene, scorer, 0.5, seed + t)
        memory = {**memory, **learnt}
    pytest.fail("warm-up never ended")


@given(st.data(), seeds)
def test_what_nobody_trained_keeps_its_estimates(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    base = model(architecture, seed)
    scorer = strategy()
    memory, _ = a_round(scene(architecture, base), scorer, 1.0, seed)
    after, selection = a_round(scene(architecture, base, memory, round=2), scorer, 0.5, seed + 1)
    before, now = (Evidence.from_tensors(architecture, m[EVIDENCE]) for m in (memory, after))
    for spec in architecture.trainable:
        out = ~selection.coverage_mask(spec.name)
        for kind in ("gradient", "curvature", "trained"):
            assert getattr(now, kind)[spec.name][out].tobytes() == getattr(before, kind)[spec.name][out].tobytes()


def test_delta_w_ranks_by_how_far_weights_moved() -> None:
    architecture = ARCHITECTURE
    base = model(architecture, 0)
    current_scene = scene(architecture, base, recipe=Recipe(lr=0.1, momentum=0.0))
    full_selection = Selection.full(architecture)
    trained_tensors = {
        n: v + np.float32(0.001) * np.arange(v.size, dtype=np.float32).reshape(v.shape) for n, v in base.items()
    }
    scorer = strategy(score="delta_w")
    update = report(current_scene, full_selection, trained_tensors, 1)
    _, fold = close_fold(strategy().aggregator, current_scene, [update], evidence=True)
    memory = scorer.learn(current_scene, fold, lambda: iter([update]))
    ranking = scorer.rank(scene(architecture, base, memory, round=2)).ranks
    channel_moves = channel_sums(
        architecture,
        lambda n: np.abs(trained_tensors[n].astype(np.float64) - base[n]),
        [t.kind for t in architecture.trainable],
    )
    assert all(np.array_equal(a, b) for a, b in zip(ranking, rank_channels(channel_moves), strict=True))
    evidence = Evidence.from_tensors(architecture, memory[EVIDENCE])
    assert all(
        np.allclose(a, 10 * b, rtol=1e-4)
        for a, b in zip(movement_scores(architecture, evidence), channel_moves, strict=True)
    )


@pytest.mark.parametrize(
    "job", [Job(strategy="ca-hfp"), Job(scorer="curvature"), Job(strategy="ca-hfp", options={"score": "delta_w"})]
)
def test_a_gradient_is_a_step_s_move_over_the_rate_that_momentum_makes_of_lr(job: Job) -> None:
    """g = −Δ / (f·η_eff): η_eff = lr / (1 − momentum) is 0.2 / 0.25, and three steps from a standstill move f = Σ (1 −
    0.75^j) = 1.265625 times as far. h = s·g² of one device, of s = 3·16/2 samples."""
    base, full_selection, scorer = model(ARCHITECTURE, 0), Selection.full(ARCHITECTURE), compose(job)
    current_scene = scene(ARCHITECTURE, base, recipe=Recipe(lr=0.2, momentum=0.75, batch_size=16, epochs=2))
    update = report(current_scene, full_selection, {n: v - np.float32(0.06) for n, v in base.items()}, steps=3)
    _, fold = close_fold(strategy().aggregator, current_scene, [update], evidence=scorer.observes_movement)
    got = Evidence.from_tensors(ARCHITECTURE, scorer.learn(current_scene, fold, lambda: iter([update]))[EVIDENCE])
    slope = 0.06 / 1.265625 / 0.8
    assert all(np.allclose(v, slope, rtol=1e-4) for v in got.gradient.values())
    assert all(np.allclose(v, 24 * slope**2, rtol=1e-4) for v in got.curvature.values())


def test_scores_that_learn_need_sgd() -> None:
    recipe = Recipe(optimizer="adam")
    for score in ("curvature", "delta_w"):
        with pytest.raises(ConfigError, match="SGD"):
            ca_hfp(Job(strategy="ca-hfp", recipe=recipe, options={"score": score}))
    assert ca_hfp(Job(strategy="ca-hfp", recipe=recipe, options={"score": "l1"})).observes_movement is False
