"""Activations that are computed again: the same numbers, less memory, and what a step is said to take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedprune.core.errors import PlanError
from fedprune.model import step_contract
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Features
from fedprune.model.selection import Selection, Tensors
from fedprune.runtime.session import Session
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.liveness import execution_order, live_bytes
from fedprune_export.pruning.model import Model
from fedprune_export.training.checkpointing import recomputed, value_sizes
from fedprune_export.training.memory import fitted, training_memory
from fedprune_export.training.step_graph import training_graph
from support.nets.small_nets import seeded

pytestmark = pytest.mark.torch

BATCH = 8
KINDS = {"batch": lambda c: nn.BatchNorm2d(c), "group": lambda c: nn.GroupNorm(4, c)}


def deep(kind: str) -> nn.Module:
    layers: list[nn.Module] = []
    before = 3
    for after in (16, 16, 16, 16, 32, 32):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), KINDS[kind](after), nn.ReLU()]
        before = after
    net = nn.Sequential(*layers, nn.AvgPool2d(16), nn.Flatten(), nn.Linear(32, 4))
    net.input_shape = (3, 16, 16)  # type: ignore[assignment]
    return seeded(net)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {kind: import_onnx(export_torch(deep(kind)), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def whole(models: dict[str, Model]) -> tuple[Graph, tuple[int, ...], Tensors]:
    """The graph of one of them at full width."""
    return written(models["batch"], 1.0)


def feeds(model: Model, graph: Graph, tensors: Tensors) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    out: dict[str, Any] = dict(tensors)
    out[step_contract.X] = rng.standard_normal((BATCH, *model.architecture.input_shape)).astype(np.float32)
    out[step_contract.Y] = rng.integers(0, 4, BATCH)
    out |= {
        n: np.array(0.1, np.float32) for n in (step_contract.LR, step_contract.MOMENTUM, step_contract.WEIGHT_DECAY)
    }
    out |= {p.name: np.zeros_like(tensors[p.name.split("::")[0]]) for p in graph.inputs if "::" in p.name}
    return out


def written(model: Model, density: float) -> tuple[Graph, tuple[int, ...], Tensors]:
    widths = widths_at(model.architecture, density)
    tensors = Selection.of(model.architecture, widths).gather(model.tensors)
    return training_graph(model, Features()), widths, tensors


def most(graph: Graph, sizes: dict[str, int]) -> int:
    return max(live_bytes(execution_order(graph), sizes, [p.name for p in graph.outputs]))


@pytest.mark.parametrize(
    ("kind", "density"),
    [
        ("batch", 0.5),
        *(pytest.param(*row, marks=pytest.mark.soak) for row in (("group", 1.0), ("batch", 1.0), ("group", 0.5))),
    ],
)
def test_the_same_numbers_in_less_memory(models: dict[str, Model], kind: str, density: float) -> None:
    model = models[kind]
    graph, widths, tensors = written(model, density)
    sizes = value_sizes(graph, model.architecture, widths, BATCH)
    found = recomputed(graph, sizes, 0)
    assert found.values
    fed = feeds(model, graph, tensors)
    before = Session(graph.to_bytes(), training=True).run(fed)
    after = Session(found.graph.to_bytes(), training=True).run(fed)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert np.array_equal(value, after[name]), name
    assert found.live_bytes < 0.8 * most(graph, dict(sizes.bytes))


def test_onnxruntime_runs_every_second_computation_late(models: dict[str, Model], tmp_path: Path) -> None:
    """What runs, in which order, is what the memory was reckoned from: nothing was merged, nothing runs early."""
    import json

    import onnxruntime

    model = models["group"]
    graph, widths, tensors = written(model, 1.0)
    found = recomputed(graph, value_sizes(graph, model.architecture, widths, BATCH), 0).graph
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(found.to_bytes(), options, providers=["CPUExecutionProvider"])
    session.run(None, feeds(model, graph, tensors))
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e["name"].removesuffix("_kernel_time") for e in events if e["name"].endswith("_kernel_time")]
    place = {name: i for i, name in enumerate(ran)}
    planned = [n.name for n in execution_order(found) if n.name in place and n.op in ("Conv", "Relu", "MatMul")]
    old = {n.name for n in graph.nodes}
    second = [n for n in planned if n not in old]
    assert second
    assert second == sorted(second, key=place.__getitem__)
    forward = [n for n in planned if n in old][:6]
    assert max(place[n] for n in forward) < min(place[n] for n in second)
    copies = {n.name for n in found.nodes if n.op in ("Conv", "Relu", "MatMul")} - old
    assert copies <= set(place)


@pytest.fixture(scope="module")
def most_work(models: dict[str, Model], whole: tuple[Graph, tuple[int, ...], Tensors]) -> Callable[[int], float]:
    """What is computed again for a batch where as much as can be is: that takes longest, so once."""
    graph, widths, _ = whole

    @cache
    def work(batch: int) -> float:
        return recomputed(graph, value_sizes(graph, models["batch"].architecture, widths, batch), 0).work

    return work


@pytest.mark.soak
@settings(max_examples=12, deadline=None)
@given(share=st.floats(0.3, 1.2), batch=st.sampled_from([1, 5, 16]))
def test_no_more_is_computed_again_than_the_limit_needs(
    models: dict[str, Model],
    whole: tuple[Graph, tuple[int, ...], Tensors],
    most_work: Callable[[int], float],
    share: float,
    batch: int,
) -> None:
    model, (graph, widths, _) = models["batch"], whole
    sizes = value_sizes(graph, model.architecture, widths, batch)
    before = most(graph, dict(sizes.bytes))
    found = recomputed(graph, sizes, round(share * before))
    if share >= 1:
        assert not found.values
        assert found.graph is graph
    assert found.live_bytes <= before
    assert found.work <= most_work(batch) + 1e-9


@pytest.mark.soak
def test_a_limit_is_kept_or_refused(models: dict[str, Model]) -> None:
    model = models["batch"]
    graph, widths, _ = written(model, 1.0)
    batch = 256
    before = training_memory(graph, value_sizes(graph, model.architecture, widths, batch))
    limit = round(0.8 * before.peak)
    found = fitted(graph, model.architecture, widths, batch, limit)
    assert found.memory.peak <= limit < found.before.peak == before.peak
    assert found.values
    assert "computed again" in found.describe()
    assert fitted(graph, model.architecture, widths, batch, before.peak).graph is graph
    with pytest.raises(PlanError, match=r"doesn't fit its memory limit.*at most 60\.0 MB") as refused:
        fitted(graph, model.architecture, widths, batch, 60_000_000)
    assert "accumulate" in str(refused.value)


_PROCESS = """
import sys
import numpy as np
from fedprune.runtime.session import Session
feeds = dict(np.load(sys.argv[2]))
session = Session(open(sys.argv[1], "rb").read(), training=True)
for _ in range(3):
    session.run(feeds)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_real_process_takes_less(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["group"]
    graph, widths, tensors = written(model, 1.0)
    batch = 192
    sizes = value_sizes(graph, model.architecture, widths, batch)
    found = recomputed(graph, sizes, 0)
    fed = feeds(model, graph, tensors)
    fed[step_contract.X] = np.repeat(fed[step_contract.X], batch // BATCH, axis=0)
    fed[step_contract.Y] = np.repeat(fed[step_contract.Y], batch // BATCH)
    np.savez(tmp_path / "feeds.npz", **fed)
    peaks = []
    for one in (graph, found.graph):
        (tmp_path / "graph.onnx").write_bytes(one.to_bytes())
        command = [sys.executable, "-c", _PROCESS, str(tmp_path / "graph.onnx"), str(tmp_path / "feeds.npz")]
        peaks.append(1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    saved = most(graph, dict(sizes.bytes)) - found.live_bytes
    assert saved > 20_000_000
    assert peaks[0] - peaks[1] > saved / 2
    assert abs(training_memory(graph, sizes).peak / peaks[0] - 1) < 0.3


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "features",
    [
        {},
        {"logit_offset": True, "class_weight": True, "class_mask": True, "label_smoothing": True},
        {"proximal": True, "clip": True},
        {"accumulate": True, "gradients": True},
        {"element_mask": True, "scale": True},
        {"threshold": True},
        {"mixup": True},
        {"loss": "bce", "class_weight": True},
        {"loss": "huber"},
        {"loss": "mse"},
        {"frozen": ("0.*",)},
    ],
)
def test_every_input_is_used(models: dict[str, Model], optimizer: str, features: dict[str, Any]) -> None:
    chosen = Features(optimizer=optimizer, **features)
    model = models["batch"]
    graph = training_graph(model, chosen)
    read = {i for n in graph.nodes for i in (*n.inputs, *n.read_inside())}
    assert [p.name for p in graph.inputs if p.name not in read] == []
