"""Gradients of random networks at random widths of one graph, against torch on the physically cut networks."""

from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.cut import cut
from fedprune_export.pruning.model import Model
from support.nets import hard_nets
from support.nets.random_nets import mixing_nets, nets
from support.oracles.cutting import random_selection
from support.oracles.gradient_distance import TENSOR, Distances, Trained

pytestmark = pytest.mark.torch

few = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
"""The same networks each time: one in a thousand is so placed that torch's float32 is twice as near by luck."""


def distances(model: Model, density: float, seed: int) -> Distances:
    """Distances at one width, over three batches of each of three sizes; of one sample, where no batch norm trains."""
    selection = random_selection(model, density, seed)
    rng = np.random.default_rng(seed)
    shape, classes = model.architecture.input_shape, model.architecture.classes
    smallest_batch = 2 if any(n.op == "BatchNormalization" for n in model.graph.nodes) else 1
    samples = [
        (rng.standard_normal((b, *shape)).astype(np.float32), rng.integers(0, classes, b))
        for b in (smallest_batch, 3, 5) * 3
    ]
    return Trained(model).distances(cut(model, selection), selection.gather(model.tensors), samples)


@few
@given(model=mixing_nets(), density=st.sampled_from([0.01, 0.3, 0.5, 0.8, 1.0]), seed=st.integers(0, 99))
def test_gradients_of_mixed_channels_are_torchs(model: Model, density: float, seed: int) -> None:
    measured = distances(model, density, seed)
    assert measured.is_near, (measured.ours, measured.torch)
    assert measured.excess(measured.worst_tensor) <= TENSOR, measured.worst_tensor


@few
@given(model=nets(), density=st.sampled_from([0.01, 0.3, 0.5, 0.8, 1.0]), seed=st.integers(0, 99))
def test_gradients_of_chains_are_torchs(model: Model, density: float, seed: int) -> None:
    measured = distances(model, density, seed)
    assert measured.is_near, (measured.ours, measured.torch)
    assert measured.excess(measured.worst_tensor) <= TENSOR, measured.worst_tensor


@cache
def hard_net(name: str) -> Model:
    return import_onnx(export_torch(hard_nets.make(name)), name)


@pytest.mark.parametrize("density", [0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "SegmentSums",
            "SpatialTransformer",
            "Spectra",
            "PairDistances",
            "Overlaps",
            "PlaceAttention",
            "TokenMixing",
            "SliceWrites",
        )
    ],
)
def test_gradients_of_computed_places_and_waves_are_torchs(name: str, density: float) -> None:
    measured = distances(hard_net(name), density, 1)
    assert measured.is_near, (measured.ours, measured.torch)
    assert measured.excess(measured.worst_tensor) <= TENSOR, measured.worst_tensor
