"""Tensor files: canonical bytes, the safetensors library both ways, damage."""

import contextlib
import io
import json
import math
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ProtocolError
from fedprune.core.tensorfile import float32_array

pytestmark = pytest.mark.board

TYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
GOOD = tensorfile.encode({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)})


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, np.ndarray[Any, Any]]:
    """A few tensors of any type and shape, scalars and empty ones among them."""
    out = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=4)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        random = np.random.default_rng(draw(st.integers(0, 1000)))
        out[name] = np.asarray(random.normal(size=shape) * 3).astype(draw(st.sampled_from(TYPES)))
    return {k: v for k, v in out.items() if k != "__metadata__"}


def with_header(table: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(table).encode() if not isinstance(table, bytes) else table
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def row(start: Any, end: Any, shape: Any = (1,), code: Any = "F32") -> dict[str, Any]:
    return {"dtype": code, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, end]}


def same_array(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


@given(named_tensors())
def test_the_safetensors_library_reads_what_we_write(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    decoded = safetensors.numpy.load(tensorfile.encode(tensors, {"note": "x"}))
    assert sorted(decoded) == sorted(tensors)
    assert all(same_array(decoded[n], tensors[n]) for n in tensors)


@given(named_tensors())
def test_we_read_what_the_safetensors_library_writes(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    decoded = tensorfile.decode(safetensors.numpy.save(tensors, {"note": "x"}))
    assert sorted(decoded) == sorted(tensors)
    assert all(same_array(decoded[n], tensors[n]) for n in tensors)


@given(named_tensors())
def test_tensors_lie_in_the_given_order_without_gaps(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    raw = tensorfile.encode(tensors)
    at = 8 + int.from_bytes(raw[:8], "little")
    extents = tensorfile.tensor_offsets(raw)
    for name, value in tensors.items():
        assert extents[name][2:] == (at, at + value.nbytes)
        at += value.nbytes


def test_decoded_tensors_are_views_that_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        tensorfile.decode(GOOD)["a"][0, 0] = 1


@given(st.integers(0, len(GOOD) - 1))
def test_a_cut_file_is_refused(length: int) -> None:
    with pytest.raises(BundleError):
        tensorfile.decode(GOOD[:length])


@given(st.binary(min_size=1, max_size=20))
def test_a_file_with_bytes_behind_its_end_is_refused(tail: bytes) -> None:
    with pytest.raises(BundleError, match="is too long"):
        tensorfile.decode(GOOD + tail)


@given(st.integers(0, 7 + int.from_bytes(GOOD[:8], "little")), st.integers(1, 255))
def test_a_flipped_header_byte_is_refused_or_seen(at: int, flip: int) -> None:
    raw = bytearray(GOOD)
    raw[at] ^= flip
    try:
        extents = tensorfile.tensor_offsets(bytes(raw))
    except BundleError:
        return
    assert tensorfile.sha256_hex(bytes(raw)) != tensorfile.sha256_hex(GOOD)
    assert all(0 <= start <= end <= len(raw) for _, _, start, end in extents.values())


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(raw: bytes) -> None:
    try:
        tensorfile.decode(raw)
    except BundleError:
        return
    assert len(raw) >= 8


@pytest.mark.parametrize(
    "table",
    [
        {"a": row(0, 4), "b": row(8, 12)},
        {"a": row(0, 4), "b": row(0, 4)},
        {"a": row(-4, 0)},
        {"a": row(0, 4, (-1, -1))},
        {"a": row(0, 2**64)},
        {"a": row(0, 4, code="F33")},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": None},
        [],
        "a",
        b"{",
        b"[" * 50_000,
    ],
)
def test_damaged_headers_are_refused(table: object) -> None:
    with pytest.raises(BundleError):
        tensorfile.decode(with_header(table, bytes(4)))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(GOOD[:-1])
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        tensorfile.load_tensors(path)


@pytest.mark.parametrize("shape", [(1,) * 65, (0, 2**40, 2**40), (0, 2**47)])
def test_shapes_that_numpy_can_not_hold_are_refused(shape: tuple[int, ...]) -> None:
    size = 4 * math.prod(shape)
    with pytest.raises(BundleError, match="shape of tensor"):
        tensorfile.decode(with_header({"a": row(0, size, shape)}, bytes(size)))


@given(st.lists(st.integers(0, 2**48), max_size=70), st.sampled_from(["F32", "U8", "F64"]))
def test_any_shape_is_read_or_refused(shape: list[int], code: str) -> None:
    size = math.prod(shape) * {"F32": 4, "U8": 1, "F64": 8}[code]
    raw = with_header({"a": row(0, size, shape, code)}, bytes(min(size, 4096)))
    with suppress(BundleError):
        assert tensorfile.decode(raw)["a"].shape == tuple(shape)


def test_encoding_takes_no_memory_beside_the_file() -> None:
    tensors = {f"t{i}": np.ones((500, 500), np.float32) for i in range(8)}
    tracemalloc.start()
    raw = tensorfile.encode(tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.1 * len(raw)


def npy_bytes(value: np.ndarray, **how: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, value, **how)
    return file.getvalue()


@given(
    arrays.arrays(st.sampled_from(["<f4", ">f4"]), arrays.array_shapes(min_dims=0, min_side=0, max_dims=4)),
    st.booleans(),
)
def test_what_numpy_writes_is_read(value: np.ndarray, fortran: bool) -> None:
    got = float32_array(npy_bytes(np.asfortranarray(value) if fortran and value.ndim else value), value.shape, "x")
    assert (got.dtype, got.flags.c_contiguous) == (np.float32, True)
    np.testing.assert_array_equal(got, value)


def test_others_are_refused() -> None:
    raw = npy_bytes(np.zeros((2, 3), np.float32))
    with pytest.raises(ProtocolError, match="shape of x"):
        float32_array(raw, (3, 2), "x")
    with pytest.raises(ProtocolError, match="type of x"):
        float32_array(npy_bytes(np.zeros((2, 3))), (2, 3), "x")
    with pytest.raises(ProtocolError, match="type of x"):
        float32_array(npy_bytes(np.array([{}], object), allow_pickle=True), (1,), "x")
    for cut in (raw[:-1], raw + b"x"):
        with pytest.raises(ProtocolError, match="x"):
            float32_array(cut, (2, 3), "x")


@given(st.binary(max_size=300), st.integers(0, 140))
def test_any_bytes_are_refused_in_one_way(noise: bytes, at: int) -> None:
    raw = npy_bytes(np.zeros((2, 3), np.float32))
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
