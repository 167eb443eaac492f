"""Mixup: how samples and labels of a batch are mixed."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.model.mixup import Mixup
from fedprune_device.data.batches import MicroBatch

pytestmark = pytest.mark.board

sizes = st.lists(st.integers(1, 7), min_size=1, max_size=4)
alphas = st.floats(1e-3, 10)


def micro_batch_of(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> MicroBatch:
    return MicroBatch.of(x, y, np.arange(len(y)))


def mix(
    micro_batches: list[MicroBatch], alpha: float, seed: int, step: int = 1
) -> tuple[list[MicroBatch], npt.NDArray[np.float32]]:
    mixed_samples, share = Mixup(alpha).mix_batch([(p.make, p.y) for p in micro_batches], seed, 1, "d", step)
    return [MicroBatch(*sample_fields) for sample_fields in mixed_samples], share


def batch(sizes: list[int], loss: str, seed: int) -> list[MicroBatch]:
    rng, micro_batches = np.random.default_rng(seed), []
    for n in sizes:
        y = rng.integers(0, 9, n)
        if loss != "cross_entropy":
            y = rng.random((n, 3)).round(0 if loss == "bce" else 2).astype(np.float32)
        micro_batches.append(micro_batch_of(rng.standard_normal((n, 2, 3)).astype(np.float32), y))
    return micro_batches


@given(sizes, alphas, st.integers(0, 2**32 - 1))
def test_classes_have_partners_and_samples_are_mixed_with_theirs(sizes: list[int], alpha: float, seed: int) -> None:
    micro_batches = batch(sizes, "cross_entropy", seed)
    # A sample that says of which class it is: what is mixed into it must say the same of its partner.
    micro_batches = [micro_batch_of(np.repeat(p.y[:, None], 2, 1).astype(np.float32), p.y) for p in micro_batches]
    got, share = mix(micro_batches, alpha, seed)
    assert (share.dtype, share.shape) == (np.float32, ())
    assert 0 <= share <= 1
    for micro_batch, new in zip(micro_batches, got, strict=True):
        assert new.y is micro_batch.y
        assert new.partner is not None
        assert sorted(new.partner) == sorted(micro_batch.y)
        assert new.x.dtype == np.float32
        expected = share * micro_batch.y + (1 - share) * new.partner
        np.testing.assert_allclose(new.x, np.repeat(expected[:, None], 2, 1), atol=1e-5)


@pytest.mark.parametrize("loss", ["bce", "mse"])
@given(sizes=sizes, alpha=alphas, seed=st.integers(0, 2**32 - 1))
def test_labels_that_are_numbers_are_mixed_as_samples_are(loss: str, sizes: list[int], alpha: float, seed: int) -> None:
    micro_batches = batch(sizes, loss, seed)
    before = [(p.x.copy(), p.y.copy()) for p in micro_batches]
    same = [micro_batch_of(p.y, p.y) for p in micro_batches]
    got, twins = mix(micro_batches, alpha, seed)[0], mix(same, alpha, seed)[0]
    for micro_batch, new, twin, (x, y) in zip(micro_batches, got, twins, before, strict=True):
        assert new.partner is None
        assert new.y.dtype == np.float32
        assert np.array_equal(new.y, twin.x)
        assert 0 <= new.y.min() <= new.y.max() <= 1
        np.testing.assert_allclose(new.x.sum(0), micro_batch.x.sum(0), atol=1e-4)
        assert np.array_equal(micro_batch.x, x)
        assert np.array_equal(micro_batch.y, y)


@pytest.mark.parametrize("alpha", [1e-3, 0.2, 1.0, 10.0])
def test_shares_are_drawn_from_a_beta_distribution(alpha: float) -> None:
    one = batch([2], "mse", 0)
    shares = np.array([mix(one, alpha, 1, n)[1] for n in range(3000)], np.float64)
    assert np.isfinite(shares).all()
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
