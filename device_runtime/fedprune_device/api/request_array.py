"""Reads the array in the body of a request: JSON, safetensors, .npy or raw numbers, checked for the model's input."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, DataError, error_reason, shape_text, value_text
from fedprune.model.input_type import FLOATS, InputType
from fedprune.model.lengths import Shape, fits_shape, free_axis
from fedprune_device.api.request import Request, RequestError

Array = npt.NDArray[Any]

JSON = "application/json"
SAFETENSORS = "application/safetensors"
NPY = "application/x-npy"
RAW = "application/octet-stream"
KINDS = (JSON, SAFETENSORS, NPY, RAW)

_MAX_JSON_BYTES = 2**20  # parsing JSON numbers takes about thirty times their size in memory

# numpy evaluates a header as a Python literal, which takes far more memory than its text; a real one has 128 bytes.
_MAX_HEADER_BYTES = 4096
_ARRAY_TYPES = ("<f2", "<f4", "<f8", "|b1", "|u1", "|i1", "<i2", "<u2", "<i4", "<i8")


def json_document(request: Request, *names: str) -> dict[str, Any]:
    """The body as a JSON object with exactly these entries."""
    if len(request.body) > _MAX_JSON_BYTES:
        hint = "Send safetensors, .npy or raw numbers."
        expected = f"at most {_MAX_JSON_BYTES} bytes"
        raise RequestError(413, "size of JSON", expected=expected, got=len(request.body), hint=hint)
    expected = "an object with " + " and ".join(map(repr, names))
    try:
        entries = json.loads(request.body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "the body isn't JSON", expected=expected, got=value_text(request.body)) from error
    if not isinstance(entries, dict) or set(entries) != set(names):
        raise RequestError(400, "the body", expected=expected, got=value_text(request.body))
    return entries


def npy_bytes(x: Array) -> bytes:
    """An array as a .npy file."""
    file = io.BytesIO()
    np.save(file, x, allow_pickle=False)
    return file.getvalue()


def request_array(request: Request, shape: Shape | None, input_type: InputType = FLOATS) -> Array:
    """The array in a request's body. `shape` is the model's input shape for one sample, None without a model."""
    if request.kind == JSON:
        return _json_array(json_document(request, "x")["x"], input_type)
    if request.kind == SAFETENSORS:
        return _safetensors_array(request.body)
    return _npy_array(request.body) if request.kind == NPY else _raw_array(request.body, shape, input_type)


def request_batch(x: Array, shape: Shape, max_samples: int, input_type: InputType = FLOATS) -> Array:
    """One sample, or several [n, ...], as a batch for a model; raises `DataError` if they don't fit, or are too many.

    Names and None in `shape` match any size.
    """
    if x.ndim == len(shape):
        x = x[None]
    expected = shape_text(*shape)
    if not x.ndim or not fits_shape(x.shape[1:], shape):
        raise DataError("shape of the input", expected=f"{expected}, or [n, ...] of them", got=shape_text(*x.shape))
    if not 1 <= len(x) <= max_samples:
        raise DataError("number of samples", expected=f"1 to {max_samples}", got=len(x))
    if not x.size:
        raise DataError("the input is empty", expected=expected, got=shape_text(*x.shape))
    if input_type.is_whole:
        return np.ascontiguousarray(input_type.convert(x))
    if x.dtype.kind != "f":
        raise DataError("type of the input", expected="float32", got=x.dtype, hint=input_type.hint)
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, np.float32)
    if not np.isfinite(x).all():
        raise DataError("the input holds numbers that are not finite")
    return x


def _json_array(rows: object, input_type: InputType) -> Array:
    try:
        x = np.asarray(rows)
    except ValueError as error:  # rows of different lengths
        raise DataError("x", expected="numbers in rows of one length", got=error_reason(error)) from error
    if x.dtype.kind not in "if":
        raise DataError("x", expected="numbers in rows of one length", got=value_text(rows))
    return x if input_type.is_whole else x.astype(np.float64)


def _safetensors_array(body: bytes) -> Array:
    try:
        tensors = tensorfile.decode(body)
    except BundleError as error:
        raise DataError("the body isn't a safetensors file", got=str(error)) from error
    if list(tensors) != ["x"]:
        raise DataError("tensors in the body", expected="one, named x", got=value_text(", ".join(tensors)))
    return _check_type(tensors["x"], tensors["x"].dtype.newbyteorder("<").str)


def _npy_array(body: bytes) -> Array:
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        # The header states its own length: refuse long ones before numpy parses them.
        if int.from_bytes(body[8 : 10 if version == (1, 0) else 12], "little") > _MAX_HEADER_BYTES:
            raise ValueError("the head is too long")
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, fortran, dtype = read_header(file)
    except Exception as error:  # what is damaged makes numpy's parser raise anything
        hint = "Write it with numpy.save, without objects."
        raise DataError("the body isn't a .npy file", got=error_reason(error), hint=hint) from error
    data = memoryview(body)[file.tell() :]
    expected_bytes = math.prod(shape) * max(dtype.itemsize, 1)
    if dtype.hasobject or len(data) != expected_bytes or min(shape, default=0) < 0:
        raise DataError(f"bytes of {dtype} {shape_text(*shape)}", expected=expected_bytes, got=len(data))
    flat = np.frombuffer(data, np.uint8).view(dtype) if dtype.str in _ARRAY_TYPES else np.zeros(0, dtype)
    x = _check_type(flat, dtype.str)
    return x.reshape(shape[::-1]).T if fortran else x.reshape(shape)


def _raw_array(body: bytes, shape: Shape | None, input_type: InputType) -> Array:
    if shape is None:
        raise RequestError(
            503, "the shape of raw numbers is unknown while there is no model", hint="Send safetensors, .npy or JSON."
        )
    dtype = input_type.dtype.newbyteorder("<")
    sizes = [s for s in shape if isinstance(s, int)]
    sample_bytes = math.prod(sizes) * dtype.itemsize
    # With a free axis, raw numbers are one sample: its length follows from theirs.
    if free_axis(shape) is not None and body and sample_bytes and len(body) % sample_bytes == 0:
        return np.frombuffer(body, dtype).reshape([s if isinstance(s, int) else -1 for s in shape])
    if len(sizes) < len(shape) or not sample_bytes:
        raise DataError(f"raw numbers for {shape_text(*shape)}", hint="Send safetensors, .npy or JSON.")
    if not body or len(body) % sample_bytes:
        expected = f"{sample_bytes} for each sample of {dtype.name} {shape_text(*shape)}"
        raise DataError("bytes of raw numbers", expected=expected, got=len(body))
    return np.frombuffer(body, dtype).reshape(-1, *sizes)


def _check_type(x: Array, type_code: str) -> Array:
    if type_code not in _ARRAY_TYPES:
        raise DataError(
            "type of the numbers", expected="float32, or whole numbers where the model takes them", got=x.dtype,
            hint="Scale images as the model expects them, such as x.astype('float32') / 255.",
        )  # fmt: skip
    return x


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} isn't a JSON number")
