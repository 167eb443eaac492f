"""Calibration: statistics of exactly these samples, and nothing else touched."""

from dataclasses import replace

import numpy as np
import pytest

from fedprune.core.errors import DataError
from fedprune.model.features import Features
from fedprune_server.executor.calibration import Calibration
from fedprune_server.simulation.digits import load_digits


def test_first_statistics_are_those_of_the_samples(model):
    x, _ = load_digits()
    out = Calibration(model, x[:90], Features())(model.tensors)
    # What the first normalisation sees, by definition of a convolution.
    kernel = model.tensors["conv1.weight"][:, 0].astype(np.float64)
    padded = np.pad(x[:90, 0].astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    values = np.einsum("nhwij,cij->nchw", windows, kernel)
    np.testing.assert_allclose(out["bn1.running_mean"], values.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    # The running variance is the unbiased one, as torch keeps it.
    np.testing.assert_allclose(out["bn1.running_var"], values.var((0, 2, 3), ddof=1), rtol=2e-3)


def test_weights_stay_bit_for_bit(model):
    out = Calibration(model, load_digits()[0][:20], Features())(model.tensors)
    for spec in model.architecture.trainable:
        np.testing.assert_array_equal(out[spec.name], model.tensors[spec.name])
    assert list(out) == list(model.tensors)


@pytest.mark.parametrize("keep", [0.0, 0.99])
def test_statistics_are_the_samples_whatever_share_a_step_keeps(model, keep):
    graph = model.graph.copy()
    for node in graph.nodes:
        if node.op == "BatchNormalization":
            node.attrs["momentum"] = keep
    x = load_digits()[0][:50]
    out, usual = (Calibration(m, x, Features())(model.tensors) for m in (replace(model, graph=graph), model))
    for spec in model.architecture.statistics:
        np.testing.assert_array_equal(out[spec.name], usual[spec.name])


def test_frozen_statistics_stay_and_others_are_measured_behind_them(model):
    x = load_digits()[0][:50]
    out = Calibration(model, x, Features(frozen=("bn1.*", "conv1.*")))(model.tensors)
    unfrozen = Calibration(model, x, Features())(model.tensors)
    for name in model.tensors:
        assert (out[name].tobytes() == model.tensors[name].tobytes()) == ("bn1" in name or "running" not in name), name
    assert not np.array_equal(out["bn2.running_mean"], unfrozen["bn2.running_mean"])  # bn1 normalises by what is frozen
    head = Calibration(model, x, Features(trainable=("fc*",)))(model.tensors)
    assert all(head[n].tobytes() == v.tobytes() for n, v in model.tensors.items())


def test_order_of_the_samples_does_not_matter(model):
    x = load_digits()[0][:70]
    forward, reversed_order = (Calibration(model, v, Features())(model.tensors) for v in (x, x[::-1]))
    assert all(forward[n].tobytes() == reversed_order[n].tobytes() for n in forward)


@pytest.mark.parametrize("shape", [(5, 1, 9, 8), (1, 1, 8, 8), ()])
def test_samples_of_another_shape_are_refused(model, shape):
    with pytest.raises(DataError, match=r"\[2 or more, 1, 8, 8\]"):
        Calibration(model, np.zeros(shape, np.float32), Features())
