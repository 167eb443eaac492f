"""Compiles a fold's loops for this machine's CPU, where numba is installed.

Values become whole numbers, are weighed and added while they are in registers. Which sums and products are made, and
how they are rounded, is as in `fedprune.aggregation.fixed_point`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import mmap
import sys
import threading
import time
from typing import Any

import numpy as np

from fedprune.aggregation import compiled_kernels
from fedprune.aggregation.compiled_kernels import Loop

WORTH = 2**22
"""A model of fewer numbers is folded for many rounds sooner than loops are compiled: a few seconds, and 180 MB."""

_LOG = logging.getLogger("fedprune")

_lock = threading.Lock()
_tried = False


def load(numbers: int = WORTH) -> bool:
    """Have folds use compiled loops, from the first large model of this process on.

    Args:
        numbers: Of the model that is to be folded.

    Returns:
        Whether there are loops now: a model was large enough, numba is installed, and it may and can compile here.
    """
    global _tried
    with _lock:
        if numbers >= WORTH and not _tried:
            _tried = True
            if importlib.util.find_spec("numba") is not None:
                _load()
        return compiled_kernels.in_use()


def _load() -> None:
    if not _may_run_what_it_wrote():
        _LOG.info("numba is installed, but this process may not run code that it compiles: numpy adds updates up")
        return
    start = time.perf_counter()
    try:
        compiled_kernels.use(_compile())
    except Exception as error:  # noqa: BLE001  numpy does the same work, whatever numba's reason is
        why = str(error).split("\n", 1)[0]
        _LOG.warning("numba can't compile the loops that add updates up, numpy does it: %s", why)
    else:
        _LOG.info("compiled the loops that add updates up in %.1f s", time.perf_counter() - start)


def _may_run_what_it_wrote() -> bool:
    """Whether memory that was written to may become code, which systemd's MemoryDenyWriteExecute forbids.

    numba doesn't ask: it would end the process.
    """
    if sys.platform != "linux":
        return True
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    code = mmap.PROT_READ | mmap.PROT_EXEC
    return int(ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(mmap.PAGESIZE), code)) == 0


def _largest(bits: Any) -> Any:
    # Without its sign a float32 read as a whole number is the larger the larger it is; beyond infinity is NaN.
    largest = np.int32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    return np.int32(largest).view(np.float32)


def _scale(total: Any, factor: float, out: Any) -> None:
    for i in range(total.size):
        out[i] = total[i] * factor


# In the two that follow, places are unsigned: numba asks of others whether they count from the end, number by number.


def _scatter(
    total: Any,
    across: int,
    beside: int,
    rows: Any,
    from_rows: Any,
    columns: Any,
    from_columns: Any,
    values: Any,
    weight: int,
    factor: Any,
) -> None:
    one, length = total.dtype.type, columns.size * beside
    line = np.empty(length, total.dtype)  # a pass of its own, since numbers that lie apart have no vector instructions
    for j in range(rows.size):
        given, start = values[from_rows[j] * length : (from_rows[j] + 1) * length], rows[j] * across
        for i in range(length):
            line[i] = one(np.rint(given[i] * factor)) * one(weight)
        if beside == 1:
            for c in range(columns.size):
                total[np.uint64(start + columns[c])] += line[np.uint64(from_columns[c])]
        else:
            for c in range(columns.size):
                to, at = np.uint64((start + columns[c]) * beside), np.uint64(from_columns[c] * beside)
                for i in range(np.uint64(beside)):
                    total[to + i] += line[at + i]


def _close(total: Any, share: Any, factor: float, beside: int, rows: Any, columns: Any, base: Any, out: Any) -> None:
    for j in range(rows.size):
        start = rows[j] * columns.size
        for c in range(columns.size):
            at, to = np.uint64((j * columns.size + c) * beside), np.uint64((start + columns[c]) * beside)
            part = share[j, c]
            if part > 0:
                for i in range(np.uint64(beside)):
                    out[to + i] = (total[at + i] * factor) * part
            else:
                for i in range(np.uint64(beside)):
                    out[to + i] = base[to + i]


def _heavy(total: Any, stride: int, rows: Any, step: int, count: int, width: int, weight: int, factor: Any) -> None:
    (a,) = rows
    for j in range(count):
        t, k = total[j * stride : j * stride + width], j * step
        p = a[k : k + width]
        for i in range(width):
            t[i] += np.int64(np.rint(p[i] * factor)) * weight


def _two(total: Any, stride: int, rows: Any, step: int, count: int, width: int, weights: Any, factor: Any) -> None:
    a, b = rows
    w0, w1 = weights[0], weights[1]
    for j in range(count):
        t, k = total[j * stride : j * stride + width], j * step
        p, q = a[k : k + width], b[k : k + width]
        for i in range(width):
            t[i] += t.dtype.type(w0 * np.rint(p[i] * factor) + w1 * np.rint(q[i] * factor))


def _four(total: Any, stride: int, rows: Any, step: int, count: int, width: int, weights: Any, factor: Any) -> None:
    a, b, c, d = rows
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    for j in range(count):
        t, k = total[j * stride : j * stride + width], j * step
        p, q, r, s = a[k : k + width], b[k : k + width], c[k : k + width], d[k : k + width]
        for i in range(width):
            first = w0 * np.rint(p[i] * factor) + w1 * np.rint(q[i] * factor)
            second = w2 * np.rint(r[i] * factor) + w3 * np.rint(s[i] * factor)
            t[i] += t.dtype.type(first + second)


def _eight(total: Any, stride: int, rows: Any, step: int, count: int, width: int, weights: Any, factor: Any) -> None:
    a, b, c, d, e, f, g, h = rows
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    w4, w5, w6, w7 = weights[4], weights[5], weights[6], weights[7]
    for j in range(count):
        t, k = total[j * stride : j * stride + width], j * step
        p, q, r, s = a[k : k + width], b[k : k + width], c[k : k + width], d[k : k + width]
        x, y, z, u = e[k : k + width], f[k : k + width], g[k : k + width], h[k : k + width]
        for i in range(width):
            first = w0 * np.rint(p[i] * factor) + w1 * np.rint(q[i] * factor)
            second = w2 * np.rint(r[i] * factor) + w3 * np.rint(s[i] * factor)
            third = w4 * np.rint(x[i] * factor) + w5 * np.rint(y[i] * factor)
            fourth = w6 * np.rint(z[i] * factor) + w7 * np.rint(u[i] * factor)
            t[i] += t.dtype.type((first + second) + (third + fourth))


def _compile() -> dict[str, Loop]:
    """All loops as machine code."""
    import numba  # type: ignore[import-not-found,import-untyped,unused-ignore]

    types: Any = numba.types

    def read(kind: Any, axes: int = 1) -> Any:
        # What a device sent may be part of a buffer that nobody may write to.
        return types.Array(kind, axes, "C", readonly=True, aligned=False)

    whole, single, double = types.int64, types.float32, types.float64

    def made(loop: Loop, returns: Any, *given: Any) -> Loop:
        # Sums of products are whole numbers that float64 holds: joining the two changes no bit.
        out: Loop = numba.njit(returns(*given), nogil=True, fastmath={"contract"})(loop)
        return out

    def adding(loop: Loop, kind: Any, size: int, weight: Any) -> Loop:
        rows = types.UniTuple(read(single), size)
        return made(loop, types.void, kind[::1], whole, rows, whole, whole, whole, weight, single)

    loops = {"largest": made(_largest, single, read(types.int32))}
    for name, kind in (("f", double), ("i", whole)):
        loops[f"scale {name}"] = made(_scale, types.void, kind[::1], double, single[::1])
        places, far = read(whole), (read(single), whole, single)
        loops[f"scatter {name}"] = made(_scatter, types.void, kind[::1], whole, whole, *[places] * 4, *far)
        shares = read(double, 2)
        given = (kind[::1], shares, double, whole, places, places, read(single), single[::1])
        loops[f"close {name}"] = made(_close, types.void, *given)
        for size, loop in zip(compiled_kernels.SIZES, (_two, _four, _eight), strict=True):
            loops[f"{size} {name}"] = adding(loop, kind, size, double[::1])
    return loops | {"heavy": adding(_heavy, whole, 1, whole)}
