"""Strategies whose boards add a drift to gradients: what they remember of masked boards, and who refuses them."""

import numpy as np
import pytest

from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.strategies import compose
from fedprune.strategies.methods.drift import OWN, SHARED, advanced_boards
from fedprune.strategies.values import Cut, Scene, Submodel, Turn, UpdateReport
from support.fakes.strategy_rounds import NET
from support.nets.drawn_models import model

pytestmark = pytest.mark.board


def test_elements_that_a_board_lacks_keep_what_is_remembered() -> None:
    """Masked ones, and channels; another board's memory stays in the mean."""
    base, narrow = model(NET, 0), Selection.of(NET, [1] * len(NET.sizes))
    known = {t.name: np.full(t.shape, 4, np.float32) for t in NET.trainable}
    scene = Scene(NET, 0, 2, base, {SHARED: known, OWN + "a": known, OWN + "b": known})
    sent = Submodel(narrow, narrow.gather(base))
    mask = {"head.weight": np.arange(sent.tensors["head.weight"].size).reshape(-1, 1) % 2 == 0}
    trained = Submodel(narrow, {n: v - 1 for n, v in sent.tensors.items()}, mask)
    report = UpdateReport(Cut(scene, Turn(0, 2, "a", narrow.widths), narrow), trained, 1, 1, lambda: sent)
    memory = advanced_boards(scene, [report], lambda report, name, index, own, moved: own + moved)
    assert set(memory) == {SHARED, OWN + "a"}
    for name, value in known.items():
        held = narrow.coverage_mask(name)
        if name in mask:
            held[held] = mask[name].reshape(-1)
        np.testing.assert_allclose(memory[OWN + "a"][name], value + held, rtol=1e-6)
        np.testing.assert_allclose(memory[SHARED][name], value + held / 2, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn"])
def test_what_needs_single_updates_is_refused_where_only_sums_are_known(strategy: str) -> None:
    with pytest.raises(ConfigError, match="single updates"):
        compose(Job(strategy=strategy, secure_aggregation=True))


@pytest.mark.parametrize("strategy", ["scaffold", "fedcm"])
def test_moves_that_are_no_gradients_are_refused(strategy: str) -> None:
    with pytest.raises(ConfigError, match="optimizer"):
        compose(Job(strategy=strategy, recipe=Recipe(optimizer="adam")))
    compose(Job(strategy="feddyn", recipe=Recipe(optimizer="adam")))
