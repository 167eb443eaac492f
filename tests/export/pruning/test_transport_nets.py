"""Transport between whole networks of different widths: shapes, recovered permutations, kept functions."""

from __future__ import annotations

import numpy as np
import pytest

from fedprune.model.selection import Selection
from fedprune.strategies.optimal_transport import aggregate, prune
from support.marks import marked
from support.nets import whole_models
from support.oracles.cutting import random_selection

pytestmark = pytest.mark.torch
pytest.importorskip("ot")

NETS = (
    "lenet", "vgg11_bn", "resnet20_bn", "concat_net", "conv_mixer", "squeeze_and_excite", "vision_transformer",
    "tied_language_model",
)  # fmt: skip
LONG = ("vgg11_bn", "resnet20_bn", "vision_transformer")


@pytest.mark.parametrize("name", marked(NETS, soak=LONG))
@pytest.mark.at_push(2)
def test_submodels_and_updates_have_the_shapes_that_are_asked_for(name: str) -> None:
    model = whole_models.imported(name)
    whole = model.tensors
    at = random_selection(model, 0.6, seed=1)
    own = at.gather(whole)
    sent, lifted = prune(whole, own, at), aggregate(own, at, whole)
    for got, shapes in ((sent, at.shapes()), (lifted, Selection.full(model.architecture).shapes())):
        assert {n: v.shape for n, v in got.items()} == shapes
        assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in got.values())


@pytest.mark.parametrize("name", marked(NETS, soak=LONG))
def test_a_network_with_permuted_channels_is_led_back(name: str) -> None:
    model = whole_models.imported(name)
    whole, at = model.tensors, random_selection(model, 1.0, seed=2)
    own = at.gather(whole)
    back = aggregate(own, at, whole)
    there = prune(whole, own, at, alpha=1)
    # Rows that come twice, as fresh norms' or zero biases' do, may change places: numbers stay the same.
    assert all(np.array_equal(back[n], whole[n]) and np.array_equal(there[n], own[n]) for n in whole)
