"""Transport between whole networks of different widths: shapes, recovered permutations, kept functions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedprune.model.architecture import widths_at
from fedprune.model.selection import Selection
from fedprune.strategies.optimal_transport import Transport
from fedprune_export.pruning.cut import at_widths
from support.marks import marked
from support.nets import whole_models
from support.oracles.cutting import distance, outputs, random_selection

pytestmark = pytest.mark.torch
pytest.importorskip("ot")

ALIKE = ("lenet", "vgg11_bn", "resnet20_bn", "concat_net", "conv_mixer", "squeeze_and_excite")
"""Networks that compute the same with permuted or duplicated channels. Depthwise, flattened, joined and gated ones."""

OTHERS = ("vision_transformer", "tied_language_model")
LONG = ("vgg11_bn", "resnet20_bn")


@pytest.mark.parametrize("name", marked((*ALIKE, *OTHERS), soak=(*LONG, "vision_transformer")))
@pytest.mark.at_push(2)
def test_submodels_and_updates_have_the_shapes_that_are_asked_for(name: str) -> None:
    model = whole_models.imported(name)
    whole = model.tensors
    at = random_selection(model, 0.6, seed=1)
    own = at.gather(whole)
    sent, lifted = Transport().prune(whole, own, at), Transport().aggregate(own, at, whole)
    for got, shapes in ((sent, at.shapes()), (lifted, Selection.full(model.architecture).shapes())):
        assert {n: v.shape for n, v in got.items()} == shapes
        assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in got.values())


@pytest.mark.parametrize("name", marked((*ALIKE, *OTHERS), soak=(*LONG, "vision_transformer")))
def test_a_network_with_permuted_channels_is_led_back(name: str) -> None:
    model = whole_models.imported(name)
    whole, at = model.tensors, random_selection(model, 1.0, seed=2)
    own = at.gather(whole)
    back = Transport().aggregate(own, at, whole)
    there = Transport().prune(whole, own, at, alpha=1)
    # Rows that come twice, as fresh norms' or zero biases' do, may change places: numbers stay the same.
    assert all(np.array_equal(back[n], whole[n]) and np.array_equal(there[n], own[n]) for n in whole)


@pytest.mark.parametrize("name", marked(ALIKE, soak=LONG))
def test_updates_at_full_width_compute_what_the_device_s_model_computes(name: str) -> None:
    """Preserving maps with one plan per group: whole ratios duplicate channels, and readers take their share."""
    model = whole_models.imported(name)
    arch, whole = model.architecture, model.tensors
    widths = [n // math.gcd(n, 2) for n in widths_at(arch, 1.0)]
    at = Selection.of(arch, widths)
    own = {n: (v * 1.1).astype(np.float32) for n, v in at.gather(whole).items()}
    lifted = Transport("preserving", "group").aggregate(own, at, whole)
    small, wide = at_widths(model, widths), at_widths(model, arch.sizes)
    small.initializers, wide.initializers = {**own, **small.initializers}, {**lifted, **wide.initializers}
    x = whole_models.samples(name, 5)
    assert distance(outputs(wide, x), outputs(small, x)) < 1e-4
    literal = Transport("literal", "group").aggregate(own, at, whole)
    wide.initializers |= literal
    assert distance(outputs(wide, x), outputs(small, x)) > 1e-2
