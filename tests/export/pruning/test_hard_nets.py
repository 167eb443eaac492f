"""Small networks that are hard to cut: every cut equals the masked original, and what can be cut is found."""

from functools import cache
from typing import Literal

import pytest
import torch

from fedprune_export.importing import ImportChoices, export_torch, import_onnx
from fedprune_export.pruning.model import Model
from support.marks import mark_soak
from support.nets import hard_nets
from support.oracles.cutting import cut_error, distance, inputs, outputs, random_selection

pytestmark = pytest.mark.torch


FINE = {
    "CrossAttention": [12, 4, 12, 6, 6],
    "DepthMultiplier": [8, 8],
    "GroupNorms": [2, 4, 8],
    "GroupedConvs": [2, 3, 8],
    "TransposedConvs": [8, 2, 3, 8],
}
"""Networks in which positions can be cut as well as heads or groups, and the sizes of the groups then."""

LONG = (
    "Activations", "ChannelsAsPlaces", "CrossAttention", "FoldedPatches", "GroupShuffle", "LRNNet",
    "SegmentSums", "SpatialTransformer",
)  # fmt: skip
"""Networks that take torch longest to export."""

NAMES = mark_soak(hard_nets.NETS, soak=LONG)


@cache
def export_net(name: str) -> bytes:
    return export_torch(hard_nets.make(name))


@cache
def import_net(name: str, prefer: Literal["coarse", "fine"] = "coarse") -> Model:
    return import_onnx(export_net(name), name, ImportChoices(prefer=prefer))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.at_push(9)
def test_the_import_computes_what_torch_computes(name: str) -> None:
    model = import_net(name)
    x = inputs(model, 4)
    with torch.no_grad():
        expected = hard_nets.make(name)(torch.from_numpy(x)).numpy()
    assert distance(outputs(model.graph, x), expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_what_can_be_cut_is_found(name: str) -> None:
    model = import_net(name)
    assert len(model.architecture.groups) >= hard_nets.NETS[name].groups, model.notes


@pytest.mark.parametrize("density", [0.25, 0.5, 0.75, 0.001])
@pytest.mark.parametrize("name", NAMES)
def test_a_cut_equals_the_masked_original(name: str, density: float) -> None:
    model = import_net(name)
    for batch in (2, 7):
        assert cut_error(model, random_selection(model, density, seed=int(density * 100) + batch), batch) < 1e-5


@pytest.mark.parametrize("name", mark_soak(FINE, soak=["CrossAttention"]))
def test_positions_are_cut_where_they_are_preferred(name: str) -> None:
    model = import_net(name, "fine")
    assert [g.size for g in model.architecture.groups] == FINE[name]
    for density, batch in ((0.25, 2), (0.5, 7), (0.75, 2), (0.001, 7)):
        assert cut_error(model, random_selection(model, density, seed=batch), batch) < 1e-5
