"""Graphs are written at any opset from 13 to 23 with the same names and numbers, and models of all these come in."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedprune.core.errors import ModelError
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import import_onnx
from fedprune_export.importing.quiet_libraries import silence_libraries
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.ir.opset_lowering import WRITABLE_OPSETS
from support.nets import opset_graphs

pytestmark = pytest.mark.torch

F32 = np.dtype(np.float32)
GRAPHS = opset_graphs.graphs()


def run(graph: Graph, feeds: dict[str, Any], opset: int) -> dict[str, Any]:
    return OnnxSession(opset_graphs.checked_bytes(graph, opset)).run(feeds)


@pytest.mark.parametrize("opset", WRITABLE_OPSETS)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_opset_gives_the_same_numbers(name: str, opset: int) -> None:
    graph, feeds = GRAPHS[name]
    expected, lowered = run(graph, feeds, 17), run(graph, feeds, opset)
    assert list(lowered) == [p.name for p in graph.outputs]
    for output, value in expected.items():
        scale = max(1e-3, float(np.abs(value).max()))
        np.testing.assert_allclose(lowered[output] / scale, value / scale, atol=2e-6)


NATIVE = {"Mish": 18, "Gelu": 20, "GroupNormalization": 21, "RMSNormalization": 23, "LayerNormalization": 17}


@pytest.mark.parametrize("opset", WRITABLE_OPSETS)
def test_what_an_opset_has_is_written_as_it_is(opset: int) -> None:
    ops = {n.op_type for n in onnx.load_model_from_string(opset_graphs.forms().to_bytes(opset=opset)).graph.node}
    assert {op for op in NATIVE if op in ops} == {op for op, since in NATIVE.items() if opset >= since}


@pytest.mark.parametrize("opset", [12, 24, 0])
def test_another_opset_is_refused(opset: int) -> None:
    with pytest.raises(ModelError, match=f"expected 13 to 23, got {opset}"):
        opset_graphs.forms().to_bytes(opset=opset)


def test_an_operator_that_an_early_opset_lacks_is_named() -> None:
    graph = Graph(inputs=[Port("x", F32, (3, 3))])
    graph.outputs = [Port(graph.emit("Trilu", "x"), F32, (3, 3))]
    with pytest.raises(ModelError, match=r"Trilu.*opset 13"):
        graph.to_bytes(opset=13)


Oracle = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
EPSILON = {"epsilon": 0.01}
ORACLES: list[tuple[str, dict[str, Any], int, Oracle]] = [
    ("Gelu", {}, 0, lambda x, s, b: functional.gelu(x)),
    ("Gelu", {"approximate": "tanh"}, 0, lambda x, s, b: functional.gelu(x, approximate="tanh")),
    ("Mish", {}, 0, lambda x, s, b: functional.mish(x)),
    ("GroupNormalization", {"num_groups": 3, **EPSILON}, 2, lambda x, s, b: functional.group_norm(x, 3, s, b, 0.01)),
    ("GroupNormalization", {"num_groups": 1, **EPSILON}, 2, lambda x, s, b: functional.group_norm(x, 1, s, b, 0.01)),
    ("RMSNormalization", {"axis": -1, **EPSILON}, 1, lambda x, s, b: functional.rms_norm(x, (6,), s, 0.01)),
    ("RMSNormalization", {"axis": 2, **EPSILON}, 1, lambda x, s, b: functional.rms_norm(x, (6,), s, 0.01)),
    ("LayerNormalization", {"axis": -1, **EPSILON}, 2, lambda x, s, b: functional.layer_norm(x, (6,), s, b, 0.01)),
    ("LayerNormalization", {"axis": 2, **EPSILON}, 2, lambda x, s, b: functional.layer_norm(x, (6,), s, b, 0.01)),
]


@pytest.mark.parametrize("opset", [13, 20, 23])
@pytest.mark.parametrize("case", range(len(ORACLES)))
def test_composites_are_what_torch_computes(case: int, opset: int) -> None:
    """The sizes of scale and bias are free, as in a training graph."""
    op, attrs, vectors, oracle = ORACLES[case]
    graph = Graph(inputs=[Port("x", F32, ("N", 6, 6)), Port("s", F32, ("C",)), Port("b", F32, ("C",))])
    graph.outputs = [Port(graph.emit(op, "x", *("s", "b")[:vectors], attrs=attrs), F32, ("N", 6, 6))]
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((4, 6, 6)), "s": rng.standard_normal(6), "b": rng.standard_normal(6)}
    outputs = OnnxSession(graph.to_bytes(opset=opset)).run({k: v.astype(np.float32) for k, v in feeds.items()})
    expected = oracle(*(torch.from_numpy(v) for v in feeds.values())).numpy()
    np.testing.assert_allclose(outputs[graph.outputs[0].name], expected, atol=2e-6)


class Everything(nn.Module):
    """Norms and activations whose form in a file depends on the opset."""

    input_shape = (8, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group, self.layer = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.LayerNorm(8)
        self.root, self.fc = nn.RMSNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.group(self.conv(x)).chunk(2, 1)
        h = torch.cat([functional.gelu(a), functional.mish(b)], 1).flatten(2).transpose(1, 2)
        q, k, v = (projection.unflatten(2, (2, 4)).transpose(1, 2) for projection in (self.layer(h), self.root(h), h))
        h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.fc(h.mean(1))


@pytest.mark.parametrize("opset", [18, 23, pytest.param(21, marks=pytest.mark.soak)])
@pytest.mark.at_push(2)
def test_what_torch_exports_at_any_opset_is_the_same_graph(opset: int) -> None:
    torch.manual_seed(0)
    module = Everything().eval()
    shapes = ({0: torch.export.Dim("N", min=1)},)
    settings: dict[str, Any] = {"dynamo": True, "optimize": False, "verbose": False, "dynamic_shapes": shapes}
    with silence_libraries():
        program = torch.onnx.export(module, (torch.zeros(2, 8, 6, 6),), opset_version=opset, **settings)
    graph = import_onnx(program.model_proto.SerializeToString(), "net").graph
    x = torch.randn(7, 8, 6, 6)
    ops = [n.op for n in graph.nodes]
    logits = OnnxSession(graph.to_bytes()).run({"x": x.numpy()})["logits"]
    assert {"GroupNormalization", "Gelu", "Mish", "LayerNormalization", "RMSNormalization", "Split"} <= set(ops)
    assert not {"InstanceNormalization", "Attention", "SplitToSequence", "Softplus", "Reciprocal"} & set(ops)
    np.testing.assert_allclose(logits, module(x).detach().numpy(), atol=1e-5)
