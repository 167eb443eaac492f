"""The median without `numpy.ma`."""

import subprocess
import sys

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, from_dtype

from fedprune.core.median import median


@given(
    st.sampled_from([np.float32, np.float64]).flatmap(
        lambda kind: arrays(kind, array_shapes(max_dims=2), elements=from_dtype(np.dtype(kind), allow_infinity=False))
    )
)
def test_it_is_numpys_bit_for_bit(numbers: npt.NDArray[np.floating]) -> None:
    with np.errstate(over="ignore"):
        expected = float(np.median(numbers))
        assert np.array_equal(median(numbers), expected, equal_nan=True)
        if numbers.ndim == 1:
            expected = float(np.median(numbers.tolist()))
            assert np.array_equal(median(numbers.tolist()), expected, equal_nan=True)


def test_it_imports_nothing() -> None:
    code = (
        "import sys, numpy; from fedprune.core.median import median; before = set(sys.modules); median([1.0, 2.0]); "
        "print(*set(sys.modules) - before, 'numpy.ma' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
