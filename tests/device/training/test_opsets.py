"""Graphs at every opset give the same numbers in the onnxruntime of a board; `opset_graphs.py` made them."""

from typing import Any

import numpy as np
import pytest

from fedprune.runtime.session import OnnxSession
from support.paths import GRAPHS

pytestmark = pytest.mark.board


@pytest.fixture(scope="module")
def opset_arrays() -> dict[str, Any]:
    with np.load(GRAPHS / "opsets.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("opset", range(13, 24))
@pytest.mark.parametrize("name", ["forms", "network"])
def test_a_graph_computes_the_same_at_every_opset(opset_arrays: dict[str, Any], name: str, opset: int) -> None:
    def arrays_of(kind: str) -> dict[str, Any]:
        return {k.split("/", 2)[2]: v for k, v in opset_arrays.items() if k.startswith(f"{name}/{kind}/")}

    outputs = OnnxSession(opset_arrays[f"{name}/opset/{opset}"].tobytes()).run(arrays_of("in"))
    for output, expected in arrays_of("out").items():
        scale = max(1e-3, float(np.abs(expected).max()))
        np.testing.assert_allclose(outputs[output] / scale, expected / scale, atol=2e-6)
