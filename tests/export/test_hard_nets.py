"""Small networks that are hard to cut: every cut equals the masked original, and what can be cut is found."""

from __future__ import annotations

from functools import cache

import hard_nets
import pytest
import torch
from cutting import cut_error, inputs, outputs, random_selection

from fedprune_export.imported import Model
from fedprune_export.importing import export_torch, import_onnx

pytestmark = pytest.mark.torch


@cache
def imported(name: str) -> Model:
    return import_onnx(export_torch(hard_nets.make(name)), name)


@pytest.mark.parametrize("name", hard_nets.NETS)
def test_the_import_computes_what_torch_computes(name: str) -> None:
    model = imported(name)
    x = inputs(model, 4)

    with torch.no_grad():
        expected = hard_nets.make(name)(torch.from_numpy(x)).numpy()

    assert abs(outputs(model.graph, x) - expected).max() < 1e-4


@pytest.mark.parametrize("name", hard_nets.NETS)
def test_what_can_be_cut_is_found(name: str) -> None:
    model = imported(name)

    assert len(model.architecture.groups) >= hard_nets.NETS[name].groups, model.notes


@pytest.mark.parametrize("density", [0.25, 0.5, 0.75, 0.001])
@pytest.mark.parametrize("name", hard_nets.NETS)
def test_a_cut_equals_the_masked_original(name: str, density: float) -> None:
    model = imported(name)

    for batch in (2, 7):
        assert cut_error(model, random_selection(model, density, seed=int(density * 100) + batch), batch) < 1e-5
