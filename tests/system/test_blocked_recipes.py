"""Every kind of recipe with channels in blocks, by the board's own trainer: the numbers of the standard graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedprune.model import step_contract
from fedprune.model.architecture import widths_at
from fedprune.model.element_mask import ElementMask
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.runtime.blocks import block_size
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.trainer import Trainer, TrainingResult
from fedprune_export.formulation import Forms
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph

torch = pytest.importorskip("torch")
from support.nets.smooth_nets import SmoothMobileNet, SmoothResNet  # noqa: E402 - torch may not be there

pytestmark = pytest.mark.torch

HERE = block_size()
CLASSES, SAMPLES = 5, 37
BASE = Recipe(epochs=2, batch_size=12, lr=0.05, momentum=0.9, weight_decay=0.01)

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "adamw": {"optimizer": "adamw", "lr": 0.003},
    "proximal": {"proximal": 0.5},
    "labels": {"logit_adjustment": True, "balance_classes": True, "mask_absent_classes": True, "label_smoothing": 0.1},
    "clipped": {"clip_norm": 0.3},
    "accumulated": {"accumulate": 3},
    "squares": {"report_squares": True},
    "squares of parts": {"report_squares": True, "accumulate": 2},
    "mixup": {"mixup": 0.4},
    "scaled": {"scale": 2.0},
    "masked": {"mask": "hard"},
    "threshold": {"mask": "threshold", "mask_threshold": 0.05},
    "patience": {"patience": 1, "epochs": 3},
    "personal": {"average": 0.5, "calibrate": True},
    "bce": {"loss": "bce"},
    "huber": {"loss": "huber", "huber_delta": 0.5},
    "frozen": {},
}


@pytest.fixture(scope="module", params=[SmoothResNet, SmoothMobileNet], ids=lambda n: n.__name__)
def model(request: pytest.FixtureRequest) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return import_onnx(export_torch(request.param()), "net")


def data(loss: str) -> LocalData:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((SAMPLES, 3, 8, 8)).astype(np.float32)
    y: Any = rng.integers(0, CLASSES - 1, SAMPLES)  # one class is absent
    if loss == "bce":
        y = rng.random((SAMPLES, CLASSES)) < 0.3
    if loss == "huber":
        y = rng.standard_normal((SAMPLES, CLASSES)).astype(np.float32)
    return LocalData(x[:29], y[:29], x[29:33], y[29:33], x[33:], y[33:])


def trained(trainer: Trainer, tensors: Tensors, recipe: Recipe, mask: ElementMask | None) -> TrainingResult:
    return trainer.train(tensors, data(recipe.loss), recipe, seed=3, device="d", round=1, classes=CLASSES, mask=mask)


def fitting(model: Model, name: str) -> Recipe:
    """A recipe, with names of this net's tensors."""
    recipe, trainable = replace(BASE, **RECIPES[name]), [t.name for t in model.architecture.trainable]
    if name == "frozen":
        return replace(recipe, frozen=tuple(trainable[:2]))
    return replace(recipe, personal=(trainable[-1],)) if name == "personal" else recipe


def apart(some: Tensors, reference: Tensors, start: Tensors | None = None) -> float:
    """How far tensors are from others, relative to what those are or, with a start, to how far they have moved."""
    zero = start or {n: np.zeros_like(v) for n, v in reference.items()}
    off = sum(float(np.sum((some[n].astype(np.float64) - reference[n]) ** 2)) for n in reference)
    return float(np.sqrt(off / sum(float(np.sum((reference[n].astype(np.float64) - zero[n]) ** 2)) for n in reference)))


@pytest.mark.parametrize("block", [0, 8])
@pytest.mark.parametrize("name", RECIPES)
def test_a_graph_for_one_board_takes_and_gives_what_the_standard_graph_does(
    model: Model, name: str, block: int
) -> None:
    """On any processor: the graph is written, not run."""
    recipe = fitting(model, name)
    widths = widths_at(model.architecture, 0.4)
    one = training_graph(model, recipe.features)
    other = training_graph(model, recipe.features, widths=widths, forms=Forms(block, 8 if block else 0))
    assert {(p.name, p.dtype) for p in other.inputs} == {(p.name, p.dtype) for p in one.inputs}
    assert {(p.name, p.dtype) for p in other.outputs} == {(p.name, p.dtype) for p in one.outputs}
    assert other.metadata.get(step_contract.BLOCK) == (str(block) if block else None)
    assert {k: v for k, v in other.metadata.items() if k != step_contract.BLOCK} == one.metadata


@pytest.mark.skipif(not HERE, reason="onnxruntime has no blocks of channels on this processor")
@pytest.mark.parametrize("name", RECIPES)
def test_a_round_in_blocks_ends_where_the_standard_graph_ends(model: Model, name: str) -> None:
    recipe, architecture = fitting(model, name), model.architecture
    # Whole blocks and others, of either net.
    widths = widths_at(architecture, 0.4 if list(RECIPES).index(name) % 2 else 1.0)
    selection = Selection.of(architecture, widths)
    tensors, mask = selection.gather(model.tensors), None
    if recipe.mask != "none":
        rng = np.random.default_rng(4)
        active = {t.name: rng.random(tensors[t.name].shape) < 0.6 for t in architecture.trainable}
        mask = ElementMask(active)
        tensors = mask.unpack(mask.pack(tensors))
    raw = training_graph(model, recipe.features).to_bytes()
    forms = Forms(HERE, recipe.micro_batch, full=1)
    whole = training_graph(model, recipe.features, widths=widths, forms=forms).to_bytes()
    plain, blocked = Trainer(raw), Trainer(raw, blocked=whole)

    wanted, got = (trained(t, tensors, recipe, mask) for t in (plain, blocked))

    assert list(got.tensors) == list(wanted.tensors)
    assert got.steps == wanted.steps
    assert got.loss_first == pytest.approx(wanted.loss_first, rel=1e-4)
    assert apart(got.tensors, wanted.tensors, tensors) < 1e-3
    assert set(got.squares) == set(wanted.squares)
    assert set(got.last_squares) == set(wanted.last_squares)
    if recipe.report_squares:
        assert apart(got.last_squares, wanted.last_squares) < 1e-3
    if mask is not None:
        assert all(not got.tensors[n][~on].any() for n, on in mask.active.items())
    # The graph's parts, cut out of it.
    again = [t.calibrated(wanted.tensors, data(recipe.loss), recipe, seed=3, device="d") for t in (plain, blocked)]
    assert apart(again[1], again[0]) < 1e-4
    losses = [t.loss(wanted.tensors, data(recipe.loss), recipe, CLASSES) for t in (plain, blocked)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
