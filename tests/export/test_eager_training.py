"""Steps computed by torch are those of the training graphs that boards run, for one device and for many at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import hard_nets
import numpy as np
import pytest
import smooth_nets
import torch
import torch_graph

from fedprune.core.errors import BundleError, ModelError
from fedprune.model.architecture import widths_at
from fedprune.model.element_mask import ElementMask
from fedprune.model.selection import Selection, Tensors
from fedprune.runtime.session import Session
from fedprune.training import step_contract
from fedprune.training.features import Features
from fedprune.training.feeds import first_step
from fedprune.training.recipe import Recipe
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.trainer import Trainer, TrainingResult
from fedprune_export.eager.context import Context
from fedprune_export.eager.program import Program
from fedprune_export.eager.stacks import Row
from fedprune_export.eager.training import TrainingStep
from fedprune_export.eager.widths import widths_of
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.ir.graph import Graph
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph

pytestmark = pytest.mark.torch

Array = np.ndarray[Any, Any]
CLOSE = 3e-5
"""Relative distance that is rounding; a sign that flips costs 1e-4 and more, so nets with kinks get several tries."""

HARD = (
    *("Activations", "Distances", "Separable1d", "UnitLength", "PadShortcut", "StridedChannels"),
    *("ChunkConcat", "ConvNeXt", "EinsumAttention", "UNet", "GroupNorms", "PixelShuffles", "RMSNorms"),
)
"""Between them they have nearly all operators and every way in which channels meet."""


@cache
def model_of(name: str) -> Model:
    make = smooth_nets.make if name in smooth_nets.NETS else hard_nets.make
    return import_onnx(export_torch(make(name)), name)


def samples_of(model: Model, rng: np.random.Generator, count: int) -> Array:
    shape = (count, *model.architecture.input_shape)
    if model.graph.inputs[0].dtype == np.int64:
        return rng.integers(0, 5, shape)
    return rng.standard_normal(shape).astype(np.float32)


def submodel(model: Model, rng: np.random.Generator, density: float) -> Tensors:
    """A submodel whose weights differ from every other one's."""
    arch = model.architecture
    tensors = Selection.of(arch, widths_at(arch, density)).gather(model.tensors)
    for spec in arch.trainable:
        moved = tensors[spec.name] + 0.02 * rng.standard_normal(tensors[spec.name].shape)
        tensors[spec.name] = moved.astype(np.float32)
    return tensors


def distance(got: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative L2 distance of results of one kind: weights, gradients, statistics, loss."""
    kinds: dict[str, list[str]] = {}
    for name in expected:
        kinds.setdefault(name.partition("::")[2] if "::" in name else name, []).append(name)
    worst = 0.0
    for names in kinds.values():
        a, b = (np.concatenate([np.asarray(x[n], np.float64).ravel() for n in names]) for x in (got, expected))
        worst = max(worst, float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-9)))
    return worst


def first_feeds(model: Model, graph: Graph, recipe: Recipe, seed: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """What devices of half width with different weights and batches are fed."""
    rng = np.random.default_rng(seed)
    inputs, out = {p.name for p in graph.inputs}, []
    for size in sizes:
        feeds = first_step(recipe, submodel(model, rng, 0.5), inputs, size, model.architecture.classes)
        feeds[step_contract.X] = samples_of(model, rng, size)
        feeds[step_contract.Y] = rng.integers(0, model.architecture.classes, size)
        if step_contract.Y_PARTNER in inputs:
            feeds[step_contract.Y_PARTNER] = rng.permutation(feeds[step_contract.Y])
            feeds[step_contract.Y_SHARE] = np.array(rng.random(), np.float32)
        out.append(feeds)
    return out


@pytest.mark.parametrize("name", HARD)
def test_a_step_is_the_training_graphs(name: str) -> None:
    model, recipe = model_of(name), Recipe()
    graph = training_graph(model, recipe.features)
    ort, ours = Session(graph.to_bytes(), training=True), TrainingStep(model, graph, recipe)
    apart, together = [], []
    for seed in range(3):
        fed = first_feeds(model, graph, recipe, seed, (4, 3))
        expected = [ort.run(f) for f in fed]
        apart.append(max(distance(ours.run(f), e) for f, e in zip(fed, expected, strict=True)))
        together.append(max(distance(g, e) for g, e in zip(ours.run_many(fed), expected, strict=True)))
        if max(apart[-1], together[-1]) < CLOSE:
            break
    assert min(apart) < CLOSE
    assert min(together) < CLOSE


@pytest.mark.parametrize("name", [*HARD[::3], "SmoothResNet"])
def test_predictions_are_those_of_an_interpreter_in_double_precision(name: str) -> None:
    model = model_of(name)
    arch, rng = model.architecture, np.random.default_rng(1)
    widths = widths_at(arch, 0.5)
    graph, tensors = at_widths(model, widths), submodel(model, rng, 0.5)
    x = samples_of(model, rng, 3)
    exact = {n: torch.from_numpy(v.astype(np.float64)) for n, v in tensors.items()}
    expected = torch_graph.run(graph, exact, torch.from_numpy(x), training=False)
    run = Context(statistics=frozenset(t.name for t in arch.statistics))
    ours = Program(graph, list(tensors), torch.device("cpu"))
    got = ours({n: torch.from_numpy(v) for n, v in tensors.items()}, torch.from_numpy(x), run)
    np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", [*HARD, *smooth_nets.NETS])
def test_nothing_but_single_numbers_meets_from_two_devices(name: str) -> None:
    """Arrays on the meta device compute nothing, but refuse to meet others on the CPU, as those on a GPU do."""
    model, meta = model_of(name), torch.device("meta")
    arch = model.architecture
    with pytest.raises(RuntimeError, match="device"):
        torch.add(torch.empty(3, device=meta), torch.ones(3))
    ours = Program(at_widths(model, arch.sizes), list(model.tensors), meta)
    statistics = frozenset(t.name for t in arch.statistics)
    tensors = {n: torch.empty(v.shape, device=meta) for n, v in model.tensors.items()}
    x = torch.from_numpy(samples_of(model, np.random.default_rng(0), 3)).to(meta)
    for training in (False, True):
        run = Context(training=training, statistics=statistics, moving=statistics)
        out = ours(tensors, x, run)
        assert (out.device.type, tuple(out.shape)) == ("meta", (3, arch.classes))


RECIPES: dict[str, Recipe] = {
    "plain": Recipe(epochs=2, batch_size=6, lr=0.05, weight_decay=1e-3),
    "adjusted": Recipe(batch_size=6, logit_adjustment=True, balance_classes=True, label_smoothing=0.1),
    "masked classes": Recipe(batch_size=6, mask_absent_classes=True, proximal=0.3),
    "clipped": Recipe(batch_size=6, clip_norm=0.3, accumulate=3),
    "weighted parts": Recipe(batch_size=6, balance_classes=True, accumulate=2),
    "adam": Recipe(batch_size=6, optimizer="adam", lr=0.01, weight_decay=0.01),
    "adamw": Recipe(batch_size=6, optimizer="adamw", lr=0.01, weight_decay=0.1, beta2=0.95),
    "mixup": Recipe(epochs=2, batch_size=6, mixup=0.6, lr=0.02),
    "mixup in parts": Recipe(batch_size=6, mixup=1.0, accumulate=2, balance_classes=True, label_smoothing=0.1),
    "mixup adjusted": Recipe(batch_size=6, mixup=0.3, logit_adjustment=True, mask_absent_classes=True),
    "mixup bce": Recipe(batch_size=6, mixup=0.5, loss="bce", balance_classes=True),
    "mixup mse": Recipe(batch_size=6, mixup=0.5, loss="mse", lr=0.02),
    "bce": Recipe(batch_size=6, loss="bce", balance_classes=True),
    "mse": Recipe(batch_size=6, loss="mse", lr=0.02),
    "huber": Recipe(batch_size=6, loss="huber", huber_delta=0.4, max_steps=3),
    "scaled": Recipe(batch_size=6, scale=2.0, lr=0.02),
    "threshold": Recipe(batch_size=6, mask="threshold", mask_threshold=0.05, proximal=0.1),
    "hard": Recipe(batch_size=6, mask="hard", weight_decay=0.01, report_squares=True),
    "patient": Recipe(epochs=4, batch_size=6, patience=1, lr=0.4),
    "frozen": Recipe(batch_size=6, frozen=("*bn*", "blocks.0.*")),
    "narrow": Recipe(epochs=2, batch_size=6, ordered_dropout=(0.25, 0.4), lr=0.02),
}


def local_data(model: Model, seed: int, count: int, loss: str) -> LocalData:
    rng = np.random.default_rng(seed)
    x, classes = samples_of(model, rng, count), model.architecture.classes
    y: Array = rng.integers(0, classes - 1, count)  # one class is missing
    if loss != "cross_entropy":
        y = rng.random((count, classes)).astype(np.float32)
        y = (y > 0.5).astype(np.float32) if loss == "bce" else y
    return LocalData(x[4:], y[4:], x[:0], y[:0], x[:4], y[:4])


def trained(
    model: Model, recipe: Recipe, session: Callable[[Graph], Any], data: LocalData, density: float = 0.5
) -> TrainingResult:
    graph = training_graph(model, recipe.features)
    rng = np.random.default_rng(data.samples)
    widths = widths_at(model.architecture, density)
    tensors, mask = submodel(model, rng, density), None
    if recipe.mask != "none":
        names = [t.name for t in model.architecture.trainable if len(t.axes) > 1][:3]
        mask = ElementMask({n: rng.random(tensors[n].shape) > 0.4 for n in names})
        if recipe.mask == "hard":
            tensors = {n: np.where(mask.active[n], v, 0) if n in names else v for n, v in tensors.items()}
    trainer = Trainer(graph.to_bytes(), session=session(graph))
    arguments = {"seed": 5, "device": "d", "round": 2, "classes": model.architecture.classes, "widths": widths}
    result = trainer.train(tensors, data, recipe, mask=mask, **arguments)
    if recipe == RECIPES["plain"]:
        calibrated = trainer.calibrated(result.tensors, data, recipe, seed=5, device="d")
        result.tensors.update({f"calibrated {n}": v for n, v in calibrated.items()})
    return result


def compare(got: TrainingResult, expected: TrainingResult) -> None:
    assert (got.steps, got.samples) == (expected.steps, expected.samples)
    assert got.train_accuracy == expected.train_accuracy
    np.testing.assert_allclose(got.loss_first, expected.loss_first, rtol=1e-5)
    np.testing.assert_allclose(got.loss_last, expected.loss_last, rtol=1e-4)
    for name, value in expected.tensors.items():
        scale = float(np.abs(value).max()) + 1e-3
        np.testing.assert_allclose(got.tensors[name], value, rtol=1e-4, atol=2e-5 * scale, err_msg=name)
    for name, value in expected.last_squares.items():
        np.testing.assert_allclose(got.last_squares[name], value, rtol=1e-3, atol=1e-7, err_msg=name)
    assert set(got.last_squares) == set(expected.last_squares)


@pytest.mark.parametrize("option", RECIPES)
def test_a_round_by_any_recipe_is_the_boards(option: str) -> None:
    model, recipe = model_of("SmoothResNet"), RECIPES[option]
    data = local_data(model, 3, 24, recipe.loss)
    expected = trained(model, recipe, lambda graph: None, data)
    compare(trained(model, recipe, lambda graph: TrainingStep(model, graph, recipe), data), expected)


@pytest.mark.parametrize("name", ["SmoothMobileNet", "SmoothSignal", "SmoothPerceptron"])
def test_a_round_of_any_family_is_the_boards(name: str) -> None:
    model, recipe = model_of(name), Recipe(epochs=3, batch_size=8, lr=0.03, logit_adjustment=True)
    data = local_data(model, 4, 30, recipe.loss)
    expected = trained(model, recipe, lambda graph: None, data)
    compare(trained(model, recipe, lambda graph: TrainingStep(model, graph, recipe), data), expected)


@pytest.mark.parametrize("option", [o for o in RECIPES if o not in ("patient", "narrow")])
def test_steps_of_many_devices_are_each_ones_own(option: str) -> None:
    """Batches differ in size, so that some rows are padding."""
    model, recipe = model_of("SmoothResNet"), RECIPES[option]
    graph = training_graph(model, recipe.features)
    ours = TrainingStep(model, graph, recipe)
    fed = first_feeds(model, graph, recipe, 1, (6, 4, 5))
    rng = np.random.default_rng(2)
    for i, feeds in enumerate(fed):
        if recipe.loss != "cross_entropy":
            feeds[step_contract.Y] = rng.random((len(feeds[step_contract.X]), model.architecture.classes)).astype(
                np.float32
            )
        if step_contract.CLASS_WEIGHT in feeds:
            feeds[step_contract.CLASS_WEIGHT] = rng.random(model.architecture.classes).astype(np.float32)
        if step_contract.DIVISOR in feeds:
            feeds[step_contract.DIVISOR] = np.array(9 + i, np.float32)
    for given, got in zip(fed, ours.run_many(fed), strict=True):
        assert distance(got, ours.run(given)) < CLOSE
    for given, got in zip(fed, ours.run_many(fed, resident=True), strict=True):
        assert isinstance(got[step_contract.following("fc.weight")], Row)
        assert distance(got, ours.run(given)) < CLOSE


def test_a_number_of_the_step_may_be_written_to() -> None:
    """What is the same in every step stays on the device; how labels are mixed is not."""
    model, recipe = model_of("SmoothResNet"), Recipe(mixup=0.5)
    graph = training_graph(model, recipe.features)
    ours = TrainingStep(model, graph, recipe)
    fed = first_feeds(model, graph, recipe, 0, (4, 4))
    for share in (0.2, 0.9):
        for each in fed:
            each[step_contract.Y_SHARE][...] = share
        for each, got in zip(fed, ours.run_many(fed, [step_contract.LOSS]), strict=True):
            assert float(got[step_contract.LOSS]) == pytest.approx(
                float(ours.run(each, [step_contract.LOSS])[step_contract.LOSS]), rel=1e-5
            )


def test_rows_that_stay_on_the_device_are_fed_as_arrays_are() -> None:
    model, recipe = model_of("SmoothResNet"), RECIPES["plain"]
    graph = training_graph(model, recipe.features)
    ours = TrainingStep(model, graph, recipe)
    fed = first_feeds(model, graph, recipe, 1, (4, 4, 4))
    moved = [n for n in graph_state(graph) if n in fed[0]]
    kept = ours.run_many(fed, resident=True)
    again = [{**f, **{n: k[step_contract.following(n)] for n in moved}} for f, k in zip(fed, kept, strict=True)]
    arrays = [{n: np.asarray(v) for n, v in f.items()} for f in again]
    for got, expected in zip(ours.run_many(again[1:]), ours.run_many(arrays[1:]), strict=True):
        assert all(np.array_equal(got[n], expected[n]) for n in expected)


def graph_state(graph: Graph) -> list[str]:
    return [p.name.removesuffix("::next") for p in graph.outputs if p.name.endswith("::next")]


def test_what_the_forward_pass_gives_needs_nothing_else() -> None:
    model, recipe = model_of("SmoothResNet"), RECIPES["plain"]
    graph = training_graph(model, recipe.features)
    ours = TrainingStep(model, graph, recipe)
    fed = first_feeds(model, graph, recipe, 1, (6, 4))
    names = [step_contract.following("bn.running_mean"), step_contract.following("bn.running_var")]
    bare = [{n: v for n, v in f.items() if n in model.tensors or n == step_contract.X} for f in fed]
    whole = ours.run(fed[0])
    for got in (ours.run(bare[0], names), ours.run_many(bare, names)[0]):
        assert set(got) == set(names)
        assert all(np.allclose(got[n], whole[n], atol=1e-6) for n in names)
    with pytest.raises(ModelError, match="can't be run"):
        ours.run(bare[0])


def test_feeds_that_torch_fails_on_are_an_error() -> None:
    model, recipe = model_of("SmoothPerceptron"), RECIPES["plain"]
    graph = training_graph(model, recipe.features)
    ours = TrainingStep(model, graph, recipe)
    fed = first_feeds(model, graph, recipe, 1, (4, 4))
    fed[1][step_contract.X] = fed[1][step_contract.X][:, :3]
    with pytest.raises(ModelError, match="torch couldn't run"):
        ours.run(fed[1])


@pytest.mark.parametrize("name", ["SmoothMobileNet", "ChunkConcat", "StridedChannels", "ConvNeXt"])
@pytest.mark.parametrize("density", [1.0, 0.6, 0.3])
def test_widths_are_read_off_shapes(name: str, density: float) -> None:
    arch = model_of(name).architecture
    widths = widths_at(arch, density)
    assert arch.shapes(widths_of(arch, arch.shapes(widths))) == arch.shapes(widths)


def test_shapes_of_no_widths_are_refused() -> None:
    arch = model_of("SmoothPerceptron").architecture
    shapes = arch.shapes(arch.sizes) | {"one.bias": (3,)}
    with pytest.raises(BundleError, match="no widths"):
        widths_of(arch, shapes)


def test_features_that_no_recipe_asks_for_are_computed_too() -> None:
    """The server's own uses of training graphs: sums of squares, losses of samples, gradients."""
    model, recipe = model_of("SmoothResNet"), Recipe()
    graph = training_graph(model, Features(squares=True, sample_losses=True, gradients=True))
    ort, ours = Session(graph.to_bytes(), training=True), TrainingStep(model, graph, recipe)
    for feeds in first_feeds(model, graph, recipe, 3, (5,)):
        assert distance(ours.run(feeds), ort.run(feeds)) < CLOSE
