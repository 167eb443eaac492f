"""Graphs at every opset give the same numbers in the onnxruntime of a board; `opset_graphs.py` made them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedprune.runtime.session import OnnxSession
from support.paths import GRAPHS

pytestmark = pytest.mark.board

FILE = GRAPHS / "opsets.npz"


@pytest.fixture(scope="module")
def held() -> dict[str, Any]:
    with np.load(FILE, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("opset", range(13, 24))
@pytest.mark.parametrize("name", ["forms", "network"])
def test_a_graph_computes_the_same_at_every_opset(held: dict[str, Any], name: str, opset: int) -> None:
    def part(kind: str) -> dict[str, Any]:
        return {k.split("/", 2)[2]: v for k, v in held.items() if k.startswith(f"{name}/{kind}/")}

    found = OnnxSession(held[f"{name}/opset/{opset}"].tobytes()).run(part("in"))
    for output, expected in part("out").items():
        scale = max(1e-3, float(np.abs(expected).max()))
        np.testing.assert_allclose(found[output] / scale, expected / scale, atol=2e-6)
