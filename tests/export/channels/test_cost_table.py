"""The cost table's rows: what a narrow model costs is what its own, cut graph says of itself."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fedprune.model.architecture import widths_at
from fedprune.model.features import Features
from fedprune.model.random_inputs import RandomInputs
from fedprune.model.selection import Selection
from fedprune.planning.costs import costs_at
from fedprune.planning.kernel_workload import workload
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.cut import cut
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.marks import mark_soak

pytestmark = pytest.mark.torch

Imported = Callable[[str], Model]
DENSITY = 0.5


class Sequences(nn.Module):
    """A recurrent net over five steps of six numbers."""

    input_shape = (5, 6)

    def __init__(self, kind: type[nn.RNNBase], both: bool) -> None:
        super().__init__()
        self.rnn = kind(6, 12, batch_first=True, bidirectional=both)
        self.fc = nn.Linear(24 if both else 12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.rnn(x)[0][:, -1])
        return out


@pytest.mark.parametrize(
    ("kind", "gates", "both"),
    [
        *(pytest.param(*row, marks=pytest.mark.soak) for row in ((nn.GRU, 3, False), (nn.LSTM, 4, False))),
        (nn.GRU, 3, True),
    ],
)
def test_recurrent_layers_multiply_once_per_step(kind: type[nn.RNNBase], gates: int, both: bool) -> None:
    architecture = import_onnx(export_torch(Sequences(kind, both)), "sequences").architecture
    directions = 2 if both else 1
    expected = directions * 5 * gates * 12 * (6 + 12) + directions * 12 * 5
    assert costs_at(architecture, architecture.sizes).forward_macs == expected


@pytest.mark.parametrize("name", mark_soak(["lenet", "resnet20_bn", "concat_net"], soak=["resnet20_bn"]))
def test_costs_at_a_width_are_those_of_the_cut_graph(name: str, imported: Imported) -> None:
    model = imported(name)
    widths = widths_at(model.architecture, DENSITY)
    narrow = import_onnx(cut(model, Selection.of(model.architecture, widths)).to_bytes(), name).architecture
    mine, its = costs_at(model.architecture, widths), costs_at(narrow, narrow.sizes)
    assert mine.forward_macs == its.forward_macs
    assert mine.kept_bytes == its.kept_bytes
    assert mine.parameters == its.parameters
    # The kernels' work as well: rows of the whole model at these widths are rows of the narrow one at its full width.
    for count in (lambda w, sizes: w.training(sizes, 4), lambda w, sizes: w.inference(sizes, 1, 16)):
        assert np.allclose(count(workload(model.architecture), widths), count(workload(narrow), narrow.sizes))


def test_rows_of_a_small_net_by_hand(imported: Imported) -> None:
    architecture = imported("lenet").architecture
    second = next(n for n in architecture.layers if n.weight == "conv2.weight")
    pool = next(n for n in architecture.layers if n.op == "MaxPool")
    sizes = architecture.sizes
    assert (second.kernel, second.stride, second.groups, second.positions) == (25, 1, 1, 64)
    assert second.input_volume.size(sizes, sizes) == 6 * 12 * 12
    assert second.output_volume.size(sizes, sizes) == 16 * 8 * 8
    assert (pool.kernel, pool.stride, pool.weight) == (4, 4, "")
    assert pool.output_volume.size((3, *sizes[1:]), sizes) == 3 * 12 * 12


@pytest.mark.parametrize(
    ("kind", "gates", "kept_count"), [pytest.param(nn.GRU, 3, 4, marks=pytest.mark.soak), (nn.LSTM, 4, 6)]
)
def test_what_a_recurrent_layer_keeps_of_every_step_is_counted(
    kind: type[nn.RNNBase], gates: int, kept_count: int
) -> None:
    architecture = import_onnx(export_torch(Sequences(kind, both=False)), "sequences").architecture
    steps = [v for v in architecture.activations if "~" in v.name and v.is_kept and v.positions == 5]
    assert len(steps) == kept_count
    assert [v.positions for v in architecture.activations if v.name.endswith("~gates")] == [5 * gates]
    assert all(v.channels.length == 12 for v in steps)


class Random(nn.Module):
    """Masks of numbers, channels, samples and features, and noise."""

    input_shape = (2, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(torch.relu(self.norm(self.conv(x))), 0.1, self.training)
        x = nn.functional.dropout2d(x, 0.2, self.training)
        x = x + torch.randn_like(x)
        x = torch.relu(self.fc1(nn.functional.dropout2d(x.mean((2, 3)), 0.3, self.training)))
        out: torch.Tensor = self.fc2(x)
        return out


@pytest.mark.parametrize("density", [1.0, DENSITY])
def test_random_inputs_count_as_memory_that_a_step_keeps(density: float) -> None:
    model, batch = import_onnx(export_torch(Random()), "random"), 7
    architecture = model.architecture
    widths = widths_at(architecture, density)
    session = OnnxSession(training_graph(model, Features()).to_bytes(), training=True)
    drawn = RandomInputs.of(session.inputs, session.metadata).draw(
        Selection.of(architecture, widths).gather(model.tensors), batch, 0
    )
    rows = [a for a in architecture.activations if a.name.endswith("~mask") or ".mean~" in a.name]
    sizes = [4 * batch * a.positions * a.channels.size(widths, architecture.sizes) for a in rows]
    assert len(drawn) == 4
    assert sorted(sizes) == sorted(numbers.nbytes for numbers in drawn.values())
    assert all(a.is_kept for a in rows)
