"""Bodies of requests: what goes in as numbers comes out as the same numbers, and nothing else gets through."""

import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedprune.core import tensorfile
from fedprune.core.errors import DataError
from fedprune.model.input_type import FLOATS as FLOAT_INPUT
from fedprune.model.input_type import InputType
from fedprune.model.lengths import Lengths
from fedprune_device.api.request import Request, RequestError
from fedprune_device.api.request_array import JSON, NPY, RAW, SAFETENSORS, request_array, request_batch
from fedprune_device.client import _body
from support.fakes.local_board import npy

pytestmark = pytest.mark.board

TAKES_TOKENS, TAKES_BYTES = (InputType(np.dtype(kind)) for kind in (np.int64, np.uint8))

FLOATS = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=1, max_dims=4, max_side=4), elements=st.floats(-1e6, 1e6, width=32)
)


def read(body: bytes, kind: str, shape: Any = None, input_type: InputType = FLOAT_INPUT) -> Any:
    return request_array(Request("POST", "/v1/predict", {}, {"content-type": kind}, body), shape, input_type)


@given(FLOATS)
def test_every_form_gives_the_same_numbers(x: Any) -> None:
    forms = [(safetensors.numpy.save({"x": x}), SAFETENSORS), (npy(x), NPY), (npy(np.asfortranarray(x)), NPY), _body(x)]
    forms += [(npy(x.astype(float)), NPY), (tensorfile.encode({"x": x}), SAFETENSORS)]
    forms += [(json.dumps({"x": x.astype(float).tolist()}).encode(), JSON), _body(x.astype(float).tolist())]
    for body, kind in forms:
        np.testing.assert_array_equal(read(body, kind), x)
    np.testing.assert_array_equal(read(x.tobytes(), RAW, x.shape), x[None])


@given(arrays.arrays(np.int64, arrays.array_shapes(max_dims=3, max_side=4), elements=st.integers(0, 2**53)))
def test_token_ids_stay_whole_numbers(x: Any) -> None:
    for body, kind in (_body(x), _body(x.tolist()), (npy(x), NPY), (npy(x.astype(np.int64)), NPY)):
        tokens = read(body, kind, None, TAKES_TOKENS)
        assert tokens.dtype == np.int64
        np.testing.assert_array_equal(tokens, x)
    np.testing.assert_array_equal(request_batch(x, x.shape, 1, TAKES_TOKENS), x[None])


def test_bytes_are_taken_as_they_are() -> None:
    x = np.arange(0, 12, dtype=np.uint8).reshape(2, 2, 3) * 20
    for body, kind in ((npy(x), NPY), _body(x.tolist()), _body(x.astype(int)), (x.tobytes(), RAW)):
        batch = request_batch(read(body, kind, x.shape[1:], TAKES_BYTES), x.shape[1:], 2, TAKES_BYTES)
        assert batch.dtype == np.uint8
        np.testing.assert_array_equal(batch, x)
    for bad in (x / 255, x.astype(int) + 100, -x.astype(int)):
        with pytest.raises(DataError) as error:
            request_batch(read(npy(bad), NPY), x.shape[1:], 2, TAKES_BYTES)
        assert "255" in str(error.value.expected)
    with pytest.raises(DataError, match="float32"):
        request_batch(read(npy(x), NPY), x.shape[1:], 2)


@pytest.mark.parametrize("shape", ["(9223372036854775807, 9)", "(1000000000000,)", "(1,) * 10**9", "__import__('os')"])
def test_a_head_that_lies_takes_neither_memory_nor_time(shape: str) -> None:
    body = npy(np.zeros((5, 6), np.float32)).replace(b"(5, 6)", shape.encode())
    with pytest.raises(DataError):
        read(body, NPY)


def test_raw_numbers_may_be_a_sample_of_any_length_within_the_bounds() -> None:
    shape, x = (2, Lengths(3, 5)), np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(request_batch(read(x.tobytes(), RAW, shape), shape, 1), x[None])
    for bad in (x[:, :2], np.zeros((2, 6), np.float32)):
        with pytest.raises(DataError) as error:
            request_batch(read(bad.tobytes(), RAW, shape), shape, 1)
        assert "3:5" in str(error.value.expected)
    with pytest.raises(DataError):
        read(bytes(28), RAW, shape)


def test_raw_numbers_need_a_model_of_one_shape() -> None:
    with pytest.raises(RequestError, match="no model"):
        read(bytes(24), RAW)
    with pytest.raises(DataError, match="raw numbers for"):
        read(bytes(24), RAW, ("time", 3))
