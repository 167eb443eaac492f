"""Increments of nested submodels: together they are the files of the submodel, and nothing else is believed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core import tensorfile
from fedprune.core.errors import ProtocolError
from fedprune.model.element_mask import mask_to_bits, pack_active
from fedprune.model.selection import ElementMask, Tensors
from fedprune.updates import increments, packing

SHAPES = {"w": (5, 7), "bias": (5,), "c": (4, 2, 3, 3), "a": (1, 3), "none": (0, 3)}


def drawn(seed: int, shares: list[float]) -> tuple[Tensors, list[ElementMask]]:
    """Weights, and nested masks with about these shares of them; that of 1 is no mask."""
    rng = np.random.default_rng(seed)
    weights = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in SHAPES.items()}
    ranks = {n: rng.random(SHAPES[n]) for n in ("a", "c", "none", "w")}
    return weights, [{} if share == 1 else {n: r < share for n, r in ranks.items()} for share in shares]


def encoded(weights: Tensors, masks: list[ElementMask]) -> list[bytes]:
    return [increments.encode(weights, s, m) for s, m in zip([None, *masks], masks, strict=False)]


def files(weights: Tensors, mask: ElementMask) -> tuple[bytes, bytes]:
    """What a board is sent that downloads its submodel whole."""
    mask_file = tensorfile.encode(mask_to_bits(mask)) if mask else b""
    return tensorfile.encode(pack_active(mask, weights)), mask_file


@given(st.integers(0, 99), st.lists(st.floats(0, 0.99), min_size=1, max_size=5), st.booleans())
def test_increments_make_the_files_of_each_submodel(seed: int, shares: list[float], ends_whole: bool) -> None:
    weights, masks = drawn(seed, [*sorted(shares), *([1.0] if ends_whole else [])])
    raw = encoded(weights, masks)
    for count, mask in enumerate(masks, 1):
        assert increments.decode(raw[:count], 10**4, 10**3) == files(weights, mask)


@pytest.mark.parametrize(
    "changes",
    [
        {"w::bits": np.zeros(3, np.uint8)},
        {"w::bits": np.full(5, 255, np.uint8)},
        {"w::bits": np.zeros(5, np.float32)},
        {"w": np.zeros(3, np.float32)},
        {"w": np.full(35, np.nan, np.float32)},
        {"w": np.zeros(35, np.float64)},
        {"w::shape": np.array([2, 2])},
        {"w::shape": np.array([-5, -7])},
        {"w::shape": np.array([5.0, 7.0])},
        {"w::shape": np.array([[5, 7]])},
        {"w::shape": np.array(35)},
        {"w::shape": np.array([35] + [1] * 70)},
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, np.ndarray]) -> None:
    weights, masks = drawn(1, [0.5, 0.9, 1.0])
    raw = encoded(weights, masks)
    at = 2 if "w::shape" in changes else 1
    raw[at] = packing.pack_tensors({**packing.unpack_tensors(raw[at], 10**4), **changes})
    with pytest.raises(ProtocolError):
        increments.decode(raw, 10**4, 10**3)


def test_an_increment_is_no_larger_than_what_is_offered() -> None:
    raw = encoded(*drawn(1, [0.5]))
    for max_bytes, max_elements in ((100, 10**3), (10**4, 100)):
        with pytest.raises(ProtocolError):
            increments.decode(raw, max_bytes, max_elements)
    many = [packing.pack_tensors({f"t{i}": np.zeros(999, np.float32)}) for i in range(3)]
    for damaged in ([b"rubbish" * 99], many):
        with pytest.raises(ProtocolError):
            increments.decode(damaged, 10**4, 10**3)
