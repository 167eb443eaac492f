"""What travels in codecs counts in plans."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture, widths_at
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune.planning.cost_prediction import predict_costs
from fedprune.planning.plan_search import PlanSearch
from fedprune.planning.width_plan import LINK
from fedprune.strategies import Strategy
from fedprune.updates import CODECS, DOWNLOAD_CODECS, Codec, encode, weights
from support.fakes.strategy_rounds import NET
from support.fakes.tiny_job import WIDE

pytestmark = pytest.mark.board

PI = profile_store.find_profile("raspberry-pi-zero-2w")
RECIPE = Recipe(batch_size=8)


def tensors(net: Architecture, widths: tuple[int, ...], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {n: random.standard_normal(s).astype(np.float32) for n, s in net.shapes(widths).items()}


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("up", ["none", *CODECS])
def test_no_update_is_larger_than_planned(up: str, density: float) -> None:
    widths = widths_at(NET, density)
    codec = None if up == "none" else up
    foreseen = predict_costs(NET, widths, PI, RECIPE, 10, codecs=(codec, None)).up_bytes
    before, after = tensors(NET, widths, 0), tensors(NET, widths, 1)
    trained = {t.name for t in NET.trainable}
    if codec is None:
        assert len(tensorfile.encode(after)) == foreseen
    else:
        assert len(encode(Codec.parse(codec), after, before, trained)[0]) <= foreseen


@pytest.mark.parametrize("down", DOWNLOAD_CODECS)
def test_no_weights_are_larger_than_planned(down: str) -> None:
    foreseen = predict_costs(NET, NET.sizes, PI, RECIPE, 10, codecs=(None, down))
    before, after = tensors(NET, NET.sizes, 0), tensors(NET, NET.sizes, 1)
    trained, codec = {t.name for t in NET.trainable}, Codec.parse(down)
    assert codec is not None
    assert len(weights.encode(codec, after, before, trained)) <= foreseen.down_bytes
    assert len(weights.encode(codec, after, None, trained)) <= foreseen.first_bytes
    assert foreseen.round_bytes == max(foreseen.first_bytes, foreseen.down_bytes) + foreseen.up_bytes


@pytest.mark.parametrize("down", [None, "int8"])
def test_a_drift_is_planned_for(down: str | None) -> None:
    """It travels beside the weights, without a codec, and a board stores and holds it."""
    plain, drifts = (
        predict_costs(NET, NET.sizes, PI, replace(RECIPE, drift=d), 10, codecs=(None, down)) for d in (False, True)
    )
    trained = {t.name for t in NET.trainable}
    file = tensorfile.encode({n: v for n, v in tensors(NET, NET.sizes, 0).items() if n in trained})
    for planned in ("first_bytes", "down_bytes", "storage_bytes"):
        assert getattr(drifts, planned) - getattr(plain, planned) >= len(file)
    assert (drifts.up_bytes, drifts.transfer_s > plain.transfer_s) == (plain.up_bytes, True)
    assert drifts.memory_bytes - plain.memory_bytes >= 4 * sum(math.prod(t.shape) for t in NET.trainable)


def test_a_codec_widens_the_model_of_a_board_with_a_tight_link() -> None:
    tight = replace(
        PI, link=replace(PI.link, bytes_per_round=predict_costs(WIDE, WIDE.sizes, PI, RECIPE, 10).round_bytes // 2)
    )
    plans = {c: PlanSearch(WIDE, tight, RECIPE, 10, codecs=c).search() for c in [(None, None), ("int8", "int8")]}
    plain, coded = plans[None, None], plans["int8", "int8"]
    assert plain.bound == LINK
    assert coded.prediction.parameters > plain.prediction.parameters
    assert coded.prediction.round_bytes <= tight.link.bytes_per_round


def test_squared_gradients_travel_too() -> None:
    without, with_them = (
        predict_costs(NET, NET.sizes, PI, replace(RECIPE, report_squares=s), 10) for s in (False, True)
    )
    assert with_them.up_bytes > without.up_bytes == with_them.down_bytes


def test_a_strategys_codec_yields_to_element_masks_and_a_jobs_does_not() -> None:
    masked = Strategy(inputs="sum", uses_masks=True, compression="int8")
    assert masked.codecs(Job(), "pi", CODECS) == (None, None)
    assert masked.codecs(Job(compression="int8"), "pi", CODECS) == ("int8", None)


@pytest.mark.parametrize("setting", ["top-k:0.05", "auto", "zip"])
def test_a_strategys_codec_goes_both_ways(setting: str) -> None:
    """With `top-k` boards would train on from what most of the model once was."""
    with pytest.raises(ConfigError) as error:
        Strategy(inputs="sum", compression=setting)
    assert "compression" in error.value.what
