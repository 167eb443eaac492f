"""Outputs are compared to what rounding explains, which is measured on the reference alone."""

import numpy as np
import pytest

from fedprune.core.errors import ModelError
from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.rounding import check_outputs, relative_distance, round_array, round_weights
from support.nets.onnx_text import text_file

X = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)


def shifted(x: np.ndarray, offset: float) -> np.ndarray:
    """The same numbers, which lose digits in float32."""
    return (x + np.float32(offset)) - np.float32(offset)


@pytest.mark.parametrize(("offset", "error", "is_explained"), [(0, 1e-3, False), (1e4, 5e-4, True), (1e4, 1e-2, False)])
def test_an_error_is_found_unless_the_reference_moves_as_far_by_rounding(
    offset: float, error: float, is_explained: bool
) -> None:
    def reference(random: np.random.Generator) -> np.ndarray:
        return round_array(X + np.float32(offset), random) - np.float32(offset)

    expected = shifted(X, offset)
    outputs = expected + error * np.abs(expected).max() * np.eye(7, 5)
    if is_explained:
        (note,) = check_outputs(outputs, expected, reference, "they differ").notes
        assert "amplifies rounding" in note
    else:
        with pytest.raises(ModelError, match="they differ"):
            check_outputs(outputs, expected, reference, "they differ")


def test_what_moves_by_rounding_as_far_as_it_is_large_proves_nothing() -> None:
    with pytest.raises(ModelError, match="proves anything"):
        check_outputs(
            X * 1.1, X, lambda random: round_array(X + np.float32(1e7), random) - np.float32(1e7), "they differ"
        )


@pytest.mark.parametrize("weights", [{"tensors": {"w": X[0]}}, {"tensors": {}, "constants": {"w": X[0]}}])
def test_weights_move_wherever_a_file_stores_them(weights: dict) -> None:
    raw = text_file("y = Mul(x, w)", x="float[N,5] x", y="float[N,5] y", **weights)
    files = raw, round_weights(raw, np.random.default_rng(0))
    assert 0 < relative_distance(*(OnnxSession(file).run({"x": X})["y"] for file in files)) < 3e-7
