"""The inner loops of a fold, compiled by numba where it is installed.

They do what `fedprune.aggregation.fixed_point` does with numpy, bit for bit, in one pass over the memory instead of
five: values become whole numbers, are weighted and added while they are in registers. Each operation returns whether it
was done; where nothing is compiled, or a tensor has an unusual memory layout, numpy does it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import math
import mmap
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# Numbers of a model from which on compiling is worth its few seconds and 180 MB.
MIN_COMPILED_NUMBERS = 2**22

# Sums that a scatter works on at once: 1 MiB.
_MAX_SCATTERED_SUMS = 131_072
# float64 holds every whole number up to this magnitude.
_MAX_EXACT_INTEGER = 2**53
# How many updates `add_rows` takes at once: with eight it is no faster, where the sums are too large for the cache.
_ROWS_AT_ONCE = 4

_LOG = logging.getLogger(__name__)

Kernel = Callable[..., Any]

_lock = threading.Lock()
_tried = False
_compiled: dict[str, Kernel] = {}


def load_kernels(numbers: int = MIN_COMPILED_NUMBERS) -> bool:
    """Compile kernels for the folds of this process, once, if a model has enough numbers for it. Returns whether there
    are kernels now: a model was large enough, numba is installed, and it may and can compile here."""
    global _tried
    with _lock:
        # Tried once: what fails here fails again, and would cost each job its seconds.
        if numbers >= MIN_COMPILED_NUMBERS and not _tried:
            _tried = True
            if importlib.util.find_spec("numba") is not None:
                _load()
        return has_kernels()


def use_kernels(kernels: Mapping[str, Kernel]) -> None:
    """Work with these kernels from now on; with none, numpy does everything."""
    global _compiled
    _compiled = dict(kernels)


def current_kernels() -> Mapping[str, Kernel]:
    return _compiled


def has_kernels() -> bool:
    return bool(_compiled)


def compiled_magnitude(values: npt.NDArray[Any]) -> float | None:
    """The largest |value| of some float32s, NaN if any is; None if nothing is compiled for them."""
    kernel = _compiled.get("largest")
    if kernel is None or values.dtype != np.float32 or not values.flags.c_contiguous:
        return None
    return float(kernel(values.reshape(-1).view(np.int32)))


def scale_sums(total: npt.NDArray[np.int64], factor: float, out: npt.NDArray[np.float32]) -> bool:
    """Put sums times a factor, rounded once to float64 and once to float32, into `out`, which has their shape."""
    kernel = _compiled.get("scale")
    if kernel is None or total.shape != out.shape or not (total.flags.c_contiguous and out.flags.c_contiguous):
        return False
    kernel(total.reshape(-1), factor, out.reshape(-1))
    return True


def add_rows(
    total: npt.NDArray[np.int64], rows: Sequence[npt.NDArray[Any]], weights: Sequence[int], scale: int, bits: int
) -> bool:
    """Add Σ weight · round(values · 2^scale) to `total` in place, one weight per row; scaled values are at most 2^bits
    in magnitude. Not done for products that float64 can't hold, of boards with very many samples."""
    kernel, max_weight = _compiled.get("add"), _MAX_EXACT_INTEGER >> bits
    if kernel is None or not total.size or any(r.dtype != np.float32 or r.shape != total.shape for r in rows):
        return False
    if max(weights) > max_weight:
        return False
    lines = _memory_lines([total, *rows])
    if lines is None:
        return False
    count, width, (stride, step, *steps) = lines
    if any(row_step != step for row_step in steps):
        return False
    target, *memories = (
        _memory(array, count, width, by) for array, by in zip((total, *rows), (stride, step, *steps), strict=True)
    )
    factor = np.float32(math.ldexp(1.0, scale))
    for first, run in weight_runs(weights, max_weight, _ROWS_AT_ONCE):
        run_rows, lacking = memories[first : first + len(run)], _ROWS_AT_ONCE - len(run)
        # The rows that are lacking have the weight 0, and their numbers are in the cache.
        padded = np.array([*run, *[0] * lacking], np.float64)
        kernel(target, stride, (*run_rows, *run_rows[:1] * lacking), step, count, width, padded, factor)
    return True


class ScatteredRows(NamedTuple):
    """Values that belong to rows and columns of sums.

    Attributes:
        rows: By row of the values, the sums'; none comes twice.
        columns: The same by column.
        values: [rows, columns, numbers side by side].
        weight: What they are multiplied with.
    """

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    values: npt.NDArray[Any]
    weight: int


def scatter_rows(total: npt.NDArray[np.int64], scattered: Sequence[ScatteredRows], scale: int) -> bool:
    """Add weight · round(values · 2^scale) at rows and columns of sums [rows, columns, numbers side by side], in
    place."""
    kernel = _compiled.get("scatter")
    _, across, inner = total.shape
    if kernel is None or not total.size:
        return False
    if not all(p.flags.c_contiguous for p in (total, *(item.values for item in scattered))):
        return False
    for item in scattered:
        fits = item.values.size == item.rows.size * item.columns.size * inner
        if item.values.dtype != np.float32 or not fits:
            return False
    factor, target = np.float32(math.ldexp(1.0, scale)), total.reshape(-1)
    # The sums are traversed in memory order, and a block of them gets all values while it is in the cache.
    orders = [(np.argsort(item.rows), np.argsort(item.columns)) for item in scattered]
    ordered = [(item.rows[r], item.columns[c]) for item, (r, c) in zip(scattered, orders, strict=True)]
    if not all(_are_within(rows, len(total)) and _are_within(columns, across) for rows, columns in ordered):
        return False
    step = max(1, _MAX_SCATTERED_SUMS // (across * inner))
    for start in range(0, total.shape[0], step):
        for item, (by_row, by_column), (rows, columns) in zip(scattered, orders, ordered, strict=True):
            first, last = np.searchsorted(rows, (start, start + step))
            if first < last:
                indices = (rows[first:last], by_row[first:last], columns, by_column)
                kernel(target, across, inner, *indices, item.values.reshape(-1), item.weight, factor)
    return True


def close_sums(
    total: npt.NDArray[np.int64],
    share: npt.NDArray[np.float64],
    factor: float,
    rows: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int64],
    base: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> bool:
    """Put total · factor · share into `out` in another order, or the base where the share is 0.

    `total`: sums [rows, columns, numbers side by side]; `share`: [rows, columns]; `factor`: the sums' unit; `rows`: by
    row of the sums, where it is in `base` and `out`; `columns`: the same by column; `base`: of `total`'s shape, as
    `out`.
    """
    kernel = _compiled.get("close")
    grid = (rows.size, columns.size)
    shapes_match = base.shape == out.shape == total.shape and share.shape == total.shape[:2] == grid
    if kernel is None or not shapes_match or not all(array.flags.c_contiguous for array in (total, share, base, out)):
        return False
    if not (_are_within(np.sort(rows), len(total)) and _are_within(np.sort(columns), total.shape[1])):
        return False
    kernel(total.reshape(-1), share, factor, total.shape[2], rows, columns, base.reshape(-1), out.reshape(-1))
    return True


def weight_runs(weights: Sequence[int], max_sum: int, max_count: int) -> Iterator[tuple[int, list[int]]]:
    """Runs of weights that are added at once: where each begins, and its weights.

    A run has at most `max_count` weights, and a sum of at most `max_sum`; a larger weight has a run of its own.
    """
    first = 0
    for i in range(1, len(weights) + 1):
        if i == len(weights) or i - first == max_count or sum(weights[first : i + 1]) > max_sum:
            yield first, list(weights[first:i])
            first = i


def _are_within(indices: npt.NDArray[np.int64], length: int) -> bool:
    """Whether ascending indices are within an axis: a kernel doesn't check them."""
    return not indices.size or 0 <= int(indices[0]) <= int(indices[-1]) < length


def _memory_lines(arrays: Sequence[npt.NDArray[Any]]) -> tuple[int, int, list[int]] | None:
    """The memory of arrays of one shape as lines of neighbouring numbers.

    Returns:
        The number of lines, their length, and by array the distance from one line to the next, in numbers; None where
        the memory is not that simple, as after a transposition.
    """
    shape, width = arrays[0].shape, 1
    axis = len(shape)
    while axis and all(shape[axis - 1] == 1 or p.strides[axis - 1] == width * p.itemsize for p in arrays):
        axis -= 1
        width *= shape[axis]
    if not axis:
        return 1, width, [width] * len(arrays)
    row_steps = [p.strides[0] // p.itemsize for p in arrays]
    if axis > 1 or any(s < width or p.strides[0] % p.itemsize for s, p in zip(row_steps, arrays, strict=True)):
        return None
    return shape[0], width, row_steps


def _memory(array: npt.NDArray[Any], count: int, width: int, step: int) -> npt.NDArray[Any]:
    """An array's memory from its first number to its last."""
    if array.flags.c_contiguous:
        return array.reshape(-1)
    return np.lib.stride_tricks.as_strided(array, ((count - 1) * step + width,), (array.itemsize,))


# The kernels, as numba compiles them. Indices are unsigned in some: numba checks signed ones for being negative.


def _largest(bits: Any) -> Any:
    # Without its sign a float32 read as a whole number is the larger the larger it is; beyond infinity is NaN.
    largest = np.int32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    return np.int32(largest).view(np.float32)


def _scale(total: Any, factor: float, out: Any) -> None:
    for i in range(total.size):
        out[i] = total[i] * factor


def _scatter(
    total: Any,
    across: int,
    inner: int,
    rows: Any,
    from_rows: Any,
    columns: Any,
    from_columns: Any,
    values: Any,
    weight: int,
    factor: Any,
) -> None:
    length = columns.size * inner
    weighted = np.empty(length, np.int64)  # a pass of its own: scattered numbers have no vector instructions
    for j in range(rows.size):
        source_row, start = values[from_rows[j] * length : (from_rows[j] + 1) * length], rows[j] * across
        for i in range(length):
            weighted[i] = np.int64(np.rint(source_row[i] * factor)) * weight
        if inner == 1:
            for c in range(columns.size):
                total[np.uint64(start + columns[c])] += weighted[np.uint64(from_columns[c])]
        else:
            for c in range(columns.size):
                target, source = np.uint64((start + columns[c]) * inner), np.uint64(from_columns[c] * inner)
                for i in range(np.uint64(inner)):
                    total[target + i] += weighted[source + i]


def _close(total: Any, share: Any, factor: float, inner: int, rows: Any, columns: Any, base: Any, out: Any) -> None:
    for j in range(rows.size):
        start = rows[j] * columns.size
        for c in range(columns.size):
            source, target = np.uint64((j * columns.size + c) * inner), np.uint64((start + columns[c]) * inner)
            cell_share = share[j, c]
            if cell_share > 0:
                for i in range(np.uint64(inner)):
                    out[target + i] = (total[source + i] * factor) * cell_share
            else:
                for i in range(np.uint64(inner)):
                    out[target + i] = base[target + i]


def _add(total: Any, stride: int, rows: Any, step: int, count: int, width: int, weights: Any, factor: Any) -> None:
    a, b, c, d = rows
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    for j in range(count):
        t, k = total[j * stride : j * stride + width], j * step
        p, q, r, s = a[k : k + width], b[k : k + width], c[k : k + width], d[k : k + width]
        for i in range(width):
            first = w0 * np.rint(p[i] * factor) + w1 * np.rint(q[i] * factor)
            second = w2 * np.rint(r[i] * factor) + w3 * np.rint(s[i] * factor)
            t[i] += np.int64(first + second)


def _load() -> None:
    if not _may_execute_written_memory():
        _LOG.info("numba is installed, but this process may not run code that it compiles: numpy sums updates")
        return
    start = time.perf_counter()
    try:
        use_kernels(_compile())
    except Exception as error:  # noqa: BLE001  numpy does the same work, whatever numba's reason is
        reason = str(error).split("\n", 1)[0]
        _LOG.warning("numba can't compile the loops that sum updates, numpy does it: %s", reason)
    else:
        _LOG.info("compiled the loops that sum updates in %.1f s", time.perf_counter() - start)


def _may_execute_written_memory() -> bool:
    """Whether memory that was written to may become code, which systemd's MemoryDenyWriteExecute forbids; numba doesn't
    check, and would end the process."""
    if sys.platform != "linux":
        return True
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    code = mmap.PROT_READ | mmap.PROT_EXEC
    return int(ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(mmap.PAGESIZE), code)) == 0


def _compile() -> dict[str, Kernel]:
    import numba  # type: ignore[import-not-found,import-untyped,unused-ignore]

    types: Any = numba.types
    int64, float32, float64 = types.int64, types.float32, types.float64

    def read_only_array(kind: Any, axes: int = 1) -> Any:
        # A device's tensors may be part of a read-only buffer.
        return types.Array(kind, axes, "C", readonly=True, aligned=False)

    def compile_kernel(kernel: Kernel, returns: Any, *argument_types: Any) -> Kernel:
        # Sums of products are whole numbers that float64 holds: contracting the two changes no bit.
        compiled: Kernel = numba.njit(returns(*argument_types), nogil=True, fastmath={"contract"})(kernel)
        return compiled

    sums, indices, values, shares = (
        int64[::1], read_only_array(int64), read_only_array(float32), read_only_array(float64, 2)
    )  # fmt: skip
    rows = types.UniTuple(values, _ROWS_AT_ONCE)
    scatter_types = (sums, int64, int64, indices, indices, indices, indices, values, int64, float32)
    close_types = (sums, shares, float64, int64, indices, indices, values, float32[::1])
    return {
        "largest": compile_kernel(_largest, float32, read_only_array(types.int32)),
        "scale": compile_kernel(_scale, types.void, sums, float64, float32[::1]),
        "scatter": compile_kernel(_scatter, types.void, *scatter_types),
        "close": compile_kernel(_close, types.void, *close_types),
        "add": compile_kernel(_add, types.void, sums, int64, rows, int64, int64, int64, float64[::1], float32),
    }
