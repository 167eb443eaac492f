"""Arrays in NumPy's format from somebody else: what is written is read, and nothing else is."""

from __future__ import annotations

import contextlib
import io
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedprune.core.errors import ProtocolError
from fedprune.core.tensorfile import float32_array

pytestmark = pytest.mark.board


def written(value: np.ndarray, **how: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, value, **how)
    return file.getvalue()


@given(
    arrays.arrays(st.sampled_from(["<f4", ">f4"]), arrays.array_shapes(min_dims=0, min_side=0, max_dims=4)),
    st.booleans(),
)
def test_what_numpy_writes_is_read(value: np.ndarray, fortran: bool) -> None:
    raw = written(np.asfortranarray(value) if fortran and value.ndim else value)
    got = float32_array(raw, value.shape, "x")
    assert (got.dtype, got.flags.c_contiguous) == (np.float32, True)
    np.testing.assert_array_equal(got, value)


def test_others_are_refused() -> None:
    raw = written(np.zeros((2, 3), np.float32))
    with pytest.raises(ProtocolError, match="shape of x"):
        float32_array(raw, (3, 2), "x")
    with pytest.raises(ProtocolError, match="type of x"):
        float32_array(written(np.zeros((2, 3))), (2, 3), "x")
    with pytest.raises(ProtocolError, match="type of x"):
        float32_array(written(np.array([{}], object), allow_pickle=True), (1,), "x")
    for cut in (raw[:-1], raw + b"x"):
        with pytest.raises(ProtocolError, match="cut short or too long"):
            float32_array(cut, (2, 3), "x")


@given(st.binary(max_size=300), st.integers(0, 140))
def test_any_bytes_are_refused_in_one_way(noise: bytes, at: int) -> None:
    raw = written(np.zeros((2, 3), np.float32))
    for spoilt in (noise, raw[:at] + noise, raw[:at] + noise + raw[at + len(noise) :]):
        with contextlib.suppress(ProtocolError):
            assert float32_array(spoilt, (2, 3), "x").shape == (2, 3)


def test_a_header_that_promises_much_costs_nothing() -> None:
    shape = (1 << 40,)
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    raw = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="cut short"):
        float32_array(raw, shape, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
