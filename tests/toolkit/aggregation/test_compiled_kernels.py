"""Compiled kernels: the same bits as numpy's, whatever the memory layout."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedprune.aggregation import compiled_kernels
from fedprune.aggregation.fixed_point import VALUE_BITS, FixedSum, Range, check_range, largest_magnitude
from fedprune.aggregation.fold import Fold, Rule
from fedprune.core.errors import ProtocolError
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, Segment, TensorKind, TensorSpec
from fedprune.model.selection import Selection, Tensors
from support.nets.drawn_models import Update, rounds

SPAN = Range(3)
FoldCase = tuple[Architecture, Tensors, list[Update]]


@cache
def kernel_library() -> dict[str, compiled_kernels.Kernel]:
    return compiled_kernels._compile()


@pytest.fixture(autouse=True, scope="module")
def kernels() -> Iterator[None]:
    pytest.importorskip("numba", reason="the extra fast is not installed")
    before = compiled_kernels.current_kernels()
    compiled_kernels.use_kernels(kernel_library())
    yield
    compiled_kernels.use_kernels(before)


class Numpy:
    """Within it numpy does all work."""

    def __enter__(self) -> None:
        self._kernels = compiled_kernels.current_kernels()
        compiled_kernels.use_kernels({})

    def __exit__(self, *_: object) -> None:
        compiled_kernels.use_kernels(self._kernels)


def relocate(values: npt.NDArray[Any], how: str) -> npt.NDArray[Any]:
    """The same values, elsewhere in memory."""
    if how == "sent":  # a part of a message: nobody may write to it, and it begins anywhere
        return np.frombuffer(b"x" + values.tobytes(), np.uint8, offset=1).view(values.dtype).reshape(values.shape)
    if how == "across":
        return np.asfortranarray(values)
    if how == "apart":
        wide = np.zeros((*values.shape[:-1], 2 * values.shape[-1]), values.dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    return values


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple),
    weights=st.lists(st.integers(1, 60) | st.integers(1, 40_000), min_size=1, max_size=20),
    cut=st.booleans(),
    how=st.sampled_from(["plain", "sent", "across", "apart"]),
)
@example(seed=0, shape=(3, 5), weights=[2**24 - 100], cut=True, how="sent")
@example(seed=0, shape=(4, 4, 3, 3), weights=[3, 5], cut=True, how="plain")
def test_sums_have_the_same_bits(seed: int, shape: tuple[int, ...], weights: list[int], cut: bool, how: str) -> None:
    dice = np.random.default_rng(seed)
    rows = [(dice.standard_normal(shape) * 2 ** dice.uniform(-30, 0)).clip(-8, 8).astype(np.float32) for _ in weights]
    rows = [relocate(row, how if row.ndim else "plain") for row in rows]
    padded_shape = (*(n + 2 for n in shape[:2]), *shape[2:]) if cut else shape
    at = tuple(slice(1, n + 1) for n in shape[:2]) if cut else (...,)
    limbs = []
    for _ in range(2):
        total = FixedSum(padded_shape, SPAN)
        total.add(np.ones(padded_shape, np.float32), 7)
        if limbs:
            with Numpy():
                total.add_rows(rows, weights, at)
        else:
            total.add_rows(rows, weights, at)
        limbs.append(total.limbs[0].tobytes())
    assert limbs[0] == limbs[1]


def test_loops_are_what_adds() -> None:
    """The comparison above would hold if no loop were ever used."""
    total, rows = np.zeros((4, 6), np.int64), [np.ones((4, 5), np.float32)] * 3
    assert compiled_kernels.add_rows(total[:, :5], rows, [1, 2, 3], 35, VALUE_BITS)
    assert (total[:, :5] == 6 * 2.0**35).all()
    assert (total[:, 5] == 0).all()
    assert not compiled_kernels.add_rows(
        total[:, :5], [relocate(row, "apart") for row in rows], [1, 2, 3], 35, VALUE_BITS
    )
    one = compiled_kernels.ScatteredRows(np.array([3, 0]), np.array([2]), np.array([[1.0], [2.0]], np.float32), 5)
    assert compiled_kernels.scatter_rows(total[..., None], [one], 0)
    assert (total[3, 2], total[0, 2]) == (6 * 2.0**35 + 5, 6 * 2.0**35 + 10)
    outside = [
        one._replace(columns=np.array([6])),
        one._replace(rows=np.array([3, -1])),
        one._replace(rows=np.array([3])),
    ]
    assert not any(compiled_kernels.scatter_rows(total[..., None], [each], 0) for each in outside)
    out = np.empty((4, 6), np.float32)
    assert compiled_kernels.scale_sums(total, 2.0**-35, out)
    assert (out[:, :5] == 6).all()
    with Numpy():
        assert not compiled_kernels.scale_sums(total, 1.0, out)
        assert compiled_kernels.compiled_magnitude(out) is None


@given(
    rounds(most=11),
    st.sampled_from(["coverage", "fill", "zero"]),
    st.sampled_from(["plain", "sent"]),
    st.booleans(),
    st.sampled_from([0.0, 0.9]),
)
def test_a_fold_ends_in_the_same_bits(fold_case: FoldCase, rule: Rule, how: str, heavy: bool, momentum: float) -> None:
    architecture, base, updates = fold_case

    def model_of() -> tuple[Tensors, Tensors | None]:
        fold = Fold(architecture, base, rule=rule)
        for selection, tensors, weight, steps in updates:
            sent = {
                name: relocate(value, how) if value.size and value.ndim else value for name, value in tensors.items()
            }
            fold.add(selection, sent, weight * (100 if heavy else 1), steps)
        return fold.close(momentum)

    quick = model_of()
    with Numpy():
        slow = model_of()
    for mine, theirs in zip(quick, slow, strict=True):
        assert (mine is None) == (theirs is None)
        for name in theirs or {}:
            assert (mine or {})[name].tobytes() == (theirs or {})[name].tobytes(), name


@given(
    st.lists(st.floats(width=32), min_size=0, max_size=40),
    st.sampled_from([0.0, 2.0**-140, 1.0, 8.0, 2.0**100, 2.0**128, 2.0**140, float("inf")]),
)
@example([float("inf")], 2.0**140)
@example([-float("inf"), 1.0], 1.0)
@example([float("nan"), float("inf")], float("inf"))
@example([-0.0, -(2.0**-149)], 2.0**-149)
def test_what_is_refused_is_the_same(numbers: list[float], bound: float) -> None:
    values = np.array(numbers, np.float32)

    def range_error() -> str:
        try:
            check_range("w", values, bound)
        except ProtocolError as error:
            return str(error)
        return ""

    quick, largest = range_error(), largest_magnitude(values)
    with Numpy():
        assert (quick, repr(largest)) == (range_error(), repr(largest_magnitude(values)))


@pytest.mark.parametrize("quick", [True, False])
def test_rows_of_another_shape_are_refused(quick: bool) -> None:
    """A loop doesn't look where an array ends."""
    with nullcontext() if quick else Numpy():
        total = FixedSum((4, 6), SPAN)
        for shape in ((1, 5), (4, 5), (5, 6), (24, 2)):
            with pytest.raises(ValueError, match=r"shape|broadcast"):
                total.add_rows([np.ones(shape, np.float32)], [1])
        assert not total.limbs[0].any()
    assert not compiled_kernels.scale_sums(total.limbs[0], 1.0, np.empty((4, 5), np.float32))


@pytest.mark.parametrize("quick", [True, False])
def test_tensors_of_no_numbers_are_folded_like_others(quick: bool) -> None:
    shapes = {"a": (0, 4), "b": (0,), "c": (4, 3, 0), "d": (4, 0), "e": (4, 4)}

    def axis(n: int) -> Axis:
        return Axis((Segment(0, 0, 4),)) if n == 4 else Axis.fixed(n)

    tensors = tuple(TensorSpec(n, TensorKind.WEIGHT, tuple(axis(k) for k in shape)) for n, shape in shapes.items())
    architecture = Architecture("empty", (ChannelGroup("c", 4),), tensors, (), (), (3,), (2,))
    base = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with nullcontext() if quick else Numpy():
        fold = Fold(architecture, base)
        for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
            selection = Selection.of(architecture, (3,), [np.array(order)])
            fold.add(selection, {n: v + 1 for n, v in selection.gather(base).items()}, 3)
        averages, _ = fold.close()
    assert {name: value.shape for name, value in averages.items()} == shapes
    assert averages["e"][1, 1] == 1


def test_numpy_does_the_work_where_numba_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise ImportError("Numba needs another numpy\nand says more")

    monkeypatch.setattr(compiled_kernels, "_tried", False)
    monkeypatch.setattr(compiled_kernels, "_compile", fails)
    with Numpy():
        assert not compiled_kernels.load_kernels()
        assert not compiled_kernels.load_kernels()
    (record,) = caplog.records
    assert "Numba needs another numpy" in record.getMessage()
    assert "says more" not in record.getMessage()


def test_a_process_that_may_run_no_new_code_does_without() -> None:
    """As under systemd's MemoryDenyWriteExecute: compiling would end the process."""
    script = """
import ctypes
from fedprune.aggregation import compiled_kernels
REFUSE_EXEC_GAIN, SET_MDWE = 1, 65
assert compiled_kernels._may_execute_written_memory()
if ctypes.CDLL(None).prctl(SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0):
    print("can't be had here")
else:
    print(compiled_kernels.load_kernels())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    if "can't" in done.stdout:
        pytest.skip("memory that denies code can't be had here")
    assert done.stdout == "False\n"
