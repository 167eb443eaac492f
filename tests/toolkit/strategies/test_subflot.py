"""SubFLOT: what a device is sent, how hard it is pulled, and what becomes of what it hands in."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.methods.subflot import SubFlot
from fedprune.strategies.optimal_transport import aggregate, align, prune
from fedprune.strategies.presets import compose
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, PastUpdate, Turn
from support.fakes.strategy_reports import report, scene
from support.fakes.strategy_rounds import NET, Device, Play, identical
from support.nets.drawn_models import architectures, model, ranks, seeds, selections

pytest.importorskip("ot")
pytest.importorskip("scipy")

FLEET = {
    "a": Device(weight=3),
    "b": Device((3, 2), density=0.5, weight=5, absent_rounds=frozenset({2, 3})),
    "c": Device((5, 3), density=0.75, weight=1, absent_rounds=frozenset({1})),
}


def subflot(**options: Any) -> Strategy:
    return compose(Job(strategy="subflot", options=options))


def turn(density: float) -> Turn:
    return Turn(0, 1, "d", (), density)


@given(st.floats(0, 10), st.floats(0.01, 1))
def test_the_recipe_s_pull_is_twice_lambda_rho(sar: float, density: float) -> None:
    """A step's pull is µ·(w − w_sent), which tests of optimisers show: µ must be 2·λ·ρ."""
    recipe = Recipe(lr=0.1)
    literal = subflot(sar=sar, sar_scale="literal")
    got = literal.recipe(recipe, turn(density))
    assert got.proximal == pytest.approx(2 * sar * (1 - density))
    assert literal.recipe(recipe, turn(1.0)) == subflot(sar=sar).recipe(recipe, turn(1.0)) == recipe
    assert got.weight_decay == recipe.weight_decay


@given(st.floats(0, 10), st.floats(0.01, 1), st.floats(0, 2), st.floats(0, 0.99))
def test_a_step_pulls_no_further_than_in_the_paper(sar: float, density: float, lr: float, momentum: float) -> None:
    """What SGD takes back of the way per step, µ·lr / (1 − momentum), is that of plain SGD at 0.001, or of the literal
    λ where that is less."""
    recipe = Recipe(lr=lr, momentum=momentum)
    literal = 2 * sar * (1 - density)
    back = subflot(sar=sar).recipe(recipe, turn(density)).proximal * lr / (1 - momentum)
    assert back == pytest.approx(min(literal * lr / (1 - momentum), literal * 0.001))


def test_a_device_s_first_submodel_is_a_slice_and_later_ones_are_led_onto_its_last() -> None:
    play = Play(subflot(), model(NET, 1), FLEET)
    for round_ in range(1, 6):
        before, pasts = play.model, dict(play.past)
        play.play()
        for name, sent in play.sent.items():
            selection = Selection.of(NET, FLEET[name].widths)
            assert sent.selection.digest == selection.digest
            plain = selection.gather(before)
            past = pasts.get(name)
            assert (past is None) == (round_ == min(r for r in range(1, 6) if r not in FLEET[name].absent_rounds))
            assert identical(sent.tensors, plain if past is None else prune(before, past.tensors, selection, 0.5))
            assert identical(sent.tensors, plain) == (past is None)


def test_the_next_model_is_the_weighted_mean_of_models_at_full_width() -> None:
    play = Play(subflot(), model(NET, 1), FLEET)
    play.play(3)
    before = play.model
    after = play.play()
    expected = {n: np.zeros(v.shape) for n, v in before.items()}
    for name, each in play.reports.items():
        for tensor, value in aggregate(each.trained.tensors, each.trained.selection, before).items():
            expected[tensor] += FLEET[name].weight / 9 * value.astype(np.float64)
    for tensor, value in after.items():
        np.testing.assert_allclose(value, expected[tensor], atol=1e-6)


@given(st.data(), seeds)
def test_a_device_that_hands_in_the_model_with_permuted_channels_changes_nothing(
    data: st.DataObject, seed: int
) -> None:
    architecture = data.draw(architectures())
    global_model = model(architecture, seed)
    selection = Selection.of(architecture, architecture.sizes, data.draw(ranks(architecture)))
    lifted = SubFlot(inputs="updates").reconstruct(
        report(scene(architecture, global_model), selection, selection.gather(global_model))
    )
    assert lifted.selection.digest == Selection.full(architecture).digest
    assert identical(lifted.tensors, global_model)


@given(st.data(), seeds)
@settings(max_examples=25)
def test_alpha_0_is_the_history(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    selection = data.draw(selections(architecture))
    global_model, history = model(architecture, seed), selection.gather(model(architecture, seed + 1))
    sent = SubFlot(inputs="updates", alpha=0).extract(
        Cut(scene(architecture, global_model), turn(0.5), selection, past=PastUpdate(selection, history))
    )
    assert identical(sent.tensors, history)


@given(st.data(), seeds)
def test_a_history_takes_the_widths_that_its_device_has_now(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    old, new = (
        Selection.of(architecture, [data.draw(st.integers(1, n)) for n in architecture.sizes]) for _ in range(2)
    )
    global_model, history = model(architecture, seed), old.gather(model(architecture, seed + 1))
    cut = Cut(scene(architecture, global_model), turn(0.5), new, past=PastUpdate(old, history))
    resized = SubFlot(inputs="updates").resize_history(PastUpdate(old, history), cut)
    assert {n: v.shape for n, v in resized.items()} == new.shapes()
    assert {n: v.shape for n, v in SubFlot(inputs="updates").extract(cut).tensors.items()} == new.shapes()
    # Reference: the history over the global model, cut anew; all of the history led onto that where nothing is added.
    placed = new.gather(old.scatter(history, global_model))
    grown = any(b > a for a, b in zip(old.widths, new.widths, strict=True))
    expected: Tensors = placed if grown or old.widths == new.widths else align(history, old, placed, new)
    assert identical(resized, expected)


@given(seeds, st.integers(1, 6), st.integers(1, 4))
def test_a_history_that_shrinks_has_a_share_of_every_channel_and_one_that_grows_keeps_its_own(
    seed: int, a: int, b: int
) -> None:
    wide, narrow = Selection.full(NET), Selection.of(NET, (a, b))
    global_model, all_of_it = model(NET, seed), model(NET, seed + 1)
    vectors = [t.name for t in NET.tensors if len(t.axes) == 1 and t.axes[0].groups]
    shrunk = SubFlot(inputs="updates").resize_history(
        PastUpdate(wide, all_of_it), Cut(scene(NET, global_model), turn(0.5), narrow)
    )
    for name in vectors:  # plans with uniform marginals keep the mean over channels
        assert np.allclose(shrunk[name].mean(), all_of_it[name].mean(), atol=1e-5), name
    history = narrow.gather(all_of_it)
    grown = SubFlot(inputs="updates").resize_history(
        PastUpdate(narrow, history), Cut(scene(NET, global_model), turn(1.0), wide)
    )
    for name in vectors:
        k = len(history[name])
        assert grown[name].tobytes() == np.concatenate([history[name], global_model[name][k:]]).tobytes()


@pytest.mark.parametrize("key", ["frozen", "trainable", "personal"])
def test_tensors_that_must_stay_apart_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        compose(Job(strategy="subflot", recipe=Recipe(**{key: ("first*",)})))


def test_a_server_without_its_extra_says_so_before_a_board_is_asked() -> None:
    code = """
import sys
sys.modules["ot"] = None
from fedprune.core.errors import MissingExtraError
from fedprune.jobs.job import Job
from fedprune.strategies.presets import compose
try:
    compose(Job(strategy="subflot")).begin(None, {})
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "subflot" in done.stdout
