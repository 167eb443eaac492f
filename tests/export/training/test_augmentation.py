"""Augmentations: against numpy and torch with the same random numbers; what moves, what stays, refusals."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import fedprune_export as fx
from fedprune.core.errors import ConfigError
from fedprune.core.rng import keyed_generator
from fedprune.model.augmentation import AugmentPlan
from fedprune.model.recipe import Recipe
from fedprune.model.step_contract import AUGMENT_METADATA
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.augmentation import augment_labels, augment_samples
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph

pytestmark = pytest.mark.torch

Array = np.ndarray[Any, Any]
K, VOID, H, W = 4, -100, 6, 5
IMAGE, SOUND = (3, H, W), (2, 8)


class Pixels(nn.Module):
    """`K` numbers for each pixel, or for the whole image."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self.input_shape, self.whole, self.layer = IMAGE, whole, nn.Conv2d(3, K, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.layer(x)
        return z.mean((2, 3)) if self.whole else z


class Steps(nn.Module):
    """`K` numbers for each step of a series."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self.input_shape, self.whole, self.layer = SOUND, whole, nn.Conv1d(2, K, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.layer(x)
        return z.mean(2) if self.whole else z


class Several(nn.Module):
    """An image, a series and words, in one row of numbers."""

    def __init__(self, *, second: bool = False) -> None:
        super().__init__()
        self.input_shape = {"image": IMAGE, "words": (5,), "other": IMAGE if second else (4,)}
        self.input_dtype = {"words": torch.int64}
        self.conv, self.table = nn.Conv2d(3, 6, 1), nn.Embedding(7, 4)
        self.out = nn.Linear(10 + math.prod(self.input_shape["other"]), K)

    def forward(self, image: torch.Tensor, words: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.conv(image).mean((2, 3)), self.table(words).mean(1), other.flatten(1)], 1))


class Words(nn.Module):
    input_shape, input_dtype = (5,), torch.int64

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x).mean(1)


NETS: dict[str, Callable[[], nn.Module]] = {
    "whole": lambda: Pixels(whole=True),
    "pixels": Pixels,
    "series": lambda: Steps(whole=True),
    "steps": Steps,
    "several": Several,
    "twins": lambda: Several(second=True),
    "words": Words,
}


@functools.cache
def model_of(net: str) -> Model:
    return fx.load(NETS[net]())


@functools.lru_cache
def plan_of(model: str, *augment: str, **recipe: Any) -> AugmentPlan:
    """The plan of a training graph, as a board reads it."""
    features = Recipe(augment=augment, **recipe).features
    return AugmentPlan.from_json(training_graph(model_of(model), features).metadata[AUGMENT_METADATA])


def draw_samples(shape: tuple[int, ...], plan: AugmentPlan, seed: int, n: int = 7) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, *shape)).astype(np.float32), rng.random((n, plan.random_count), np.float32)


def flip(x: Array, u: Array) -> Array:
    return x[..., ::-1] if u[0] >= 0.5 else x


def crop(x: Array, u: Array, p: int = 2, fill: float = 0) -> Array:
    wide = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(p, p)] * 2, constant_values=fill)
    top, left = (int(v * (2 * p + 1)) for v in u)
    return wide[..., top : top + x.shape[-2], left : left + x.shape[-1]]


def shift(x: Array, u: Array, share: float = 0.25, fill: float = 0) -> Array:
    max_shift = max(1, round(share * x.shape[-1]))
    by, out = int(u[0] * (2 * max_shift + 1)) - max_shift, np.full_like(x, fill)
    for t in range(x.shape[-1]):
        if 0 <= t + by < x.shape[-1]:
            out[..., t] = x[..., t + by]
    return out


def brightness(x: Array, u: Array) -> Array:
    return x + (2 * u[0] - 1) * 0.3 * x.std()


def contrast(x: Array, u: Array) -> Array:
    return x.mean() + (1 + 0.3 * (2 * u[0] - 1)) * (x - x.mean())


def noise(x: Array, u: Array) -> Array:
    first, second = torch.tensor(u.astype(np.float64)).chunk(2)
    radius = (-2 * torch.log1p(-first)).sqrt()
    normal = torch.cat([radius * torch.cos(2 * math.pi * second), radius * torch.sin(2 * math.pi * second)])
    return x + 0.5 * normal[: x.size].reshape(x.shape).numpy()


def specaugment(x: Array, u: Array) -> Array:
    out = x.copy()
    for axis, max_width, (width, begin) in ((-2, 2, u[:2]), (-1, 3, u[2:])):
        w = int(width * (max_width + 1))
        f0 = int(begin * (x.shape[axis] - w))
        np.moveaxis(out, axis, 0)[f0 : f0 + w] = x.mean()
    return out


ORACLES: list[tuple[str, str, Any]] = [
    ("flip", "whole", flip),
    ("crop:2", "whole", crop),
    ("brightness:0.3", "whole", brightness),
    ("contrast:0.3", "whole", contrast),
    ("noise:0.5", "whole", noise),
    ("noise:0.5", "series", noise),
    ("shift:0.25", "series", shift),
    ("shift:0.25:0", "series", lambda x, u: shift(x.T, u).T),
    ("specaugment:2:3", "whole", specaugment),
    ("specaugment:2:3", "series", specaugment),
]


@pytest.mark.parametrize(("entry", "model", "formula"), ORACLES)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_step_computes_what_its_formula_says(entry: str, model: str, formula: Any, seed: int) -> None:
    plan = plan_of(model, entry)
    x, u = draw_samples(model_of(model).architecture.input_shape, plan, seed)
    got = augment_samples(plan, x, u)
    assert (got.shape, got.dtype) == (x.shape, np.float32)
    for one, numbers, augmented in zip(x, u, got, strict=True):
        np.testing.assert_allclose(augmented, formula(one.astype(np.float64), numbers), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("entry", "neutral"),
    [
        *(("flip", 0.0), ("crop:2", 0.5), ("brightness:0.3", 0.5), ("contrast:0.3", 0.5), ("noise:0.5", 0.0)),
        *(("shift:0.25", 0.5), ("specaugment:2:3", 0.0)),
    ],
)
def test_neutral_numbers_change_no_bit(entry: str, neutral: float) -> None:
    plan = plan_of("whole", entry)
    x, u = draw_samples(IMAGE, plan, 0)
    assert augment_samples(plan, x, np.full_like(u, neutral)).tobytes() == x.tobytes()
    assert augment_samples(plan, x, u).tobytes() != x.tobytes()


@given(st.integers(0, 2**32 - 1))
def test_entries_follow_each_other_in_the_recipes_order(seed: int) -> None:
    """What a crop has cut off, a shift doesn't bring back; noise before a crop is none where the crop pads."""
    plan = plan_of("whole", "crop:2", "noise:0.5", "flip", "crop:2", "shift:0.25")
    x, u = draw_samples(IMAGE, plan, seed)
    for one, numbers, augmented in zip(x, u, augment_samples(plan, x, u), strict=True):
        v, at = crop(one.astype(np.float64), numbers[:2]), 2 + one.size
        v = flip(noise(v, numbers[2:at]), numbers[at : at + 1])
        v = shift(crop(v, numbers[at + 1 : at + 3]), numbers[at + 3 :])
        np.testing.assert_allclose(augmented, v, rtol=1e-5, atol=5e-6)


@given(seed=st.integers(0, 2**32 - 1), masks=st.booleans())
def test_labels_move_with_the_pixels_that_they_describe(seed: int, masks: bool) -> None:
    """An image whose values are its labels stays one; places from outside count for nothing."""
    recipe: dict[str, Any] = {"loss": "bce"} if masks else {"ignore_label": VOID}
    plan = plan_of("pixels", "flip", "crop:2", "brightness:0.1", "shift:0.2", **recipe)
    alone = plan_of("pixels", "flip", "crop:2", "shift:0.2", **recipe)
    rng = np.random.default_rng(seed)
    y = rng.integers(1, 4, (5, H, W))
    x, u = np.repeat(y[:, None], 3, 1).astype(np.float32), rng.random((5, 4), np.float32)
    labels = (y[:, None] == np.arange(K)[:, None, None]).astype(np.float32) if masks else y
    levels = augment_samples(alone, x, u)[:, 0]
    got = augment_labels(alone, labels, u)
    assert (got.dtype, got.shape) == (labels.dtype, labels.shape)
    if masks:
        expected = (levels[:, None] == np.arange(K)[:, None, None]) & (levels[:, None] > 0)
        assert np.array_equal(got, expected.astype(np.float32))
    else:
        assert np.array_equal(got, np.where(levels == 0, VOID, levels))
    brightness_draws = np.concatenate(
        [u[:, :3], rng.random((5, 1), np.float32), u[:, 3:]], 1
    )  # a number for brightness
    assert np.array_equal(augment_labels(plan, labels, brightness_draws), got)


def test_labels_of_steps_move_in_time() -> None:
    plan = plan_of("steps", "shift:0.25", ignore_label=VOID)
    y = np.arange(16).reshape(2, 8) % 8
    u = np.array([[0.1], [0.9]], np.float32)
    shifted = augment_labels(plan, y, u)
    assert np.array_equal(shifted[0], [VOID, VOID, 0, 1, 2, 3, 4, 5])
    assert np.array_equal(shifted[1], [2, 3, 4, 5, 6, 7, VOID, VOID])
    x = np.repeat(y[:, None], 2, 1).astype(np.float32)
    assert np.array_equal(augment_samples(plan, x, u)[:, 0], np.where(shifted == VOID, 0, shifted))


@pytest.mark.parametrize(
    ("model", "entry"), [("several", "flip"), ("twins", "flip@other"), ("several", "noise:1@other")]
)
def test_of_several_inputs_one_is_augmented(model: str, entry: str) -> None:
    plan = plan_of(model, entry)
    x, u = draw_samples(model_of(model).architecture.input_shape, plan, 0)
    u[:] = 0.6
    image = np.s_[:, : math.prod(IMAGE)]
    middle = np.s_[:, math.prod(IMAGE) : -5]
    got, changed = augment_samples(plan, x, u), middle if "@" in entry else image
    still = np.ones(x.shape, bool)
    still[changed] = False
    assert np.array_equal(got[still], x[still])
    assert not np.array_equal(got[changed], x[changed])
    if "flip" in entry:
        shaped = x[changed].reshape(-1, *IMAGE)
        assert np.array_equal(got[changed].reshape(shaped.shape), shaped[..., ::-1])


@pytest.mark.parametrize(
    ("model", "augment", "recipe"),
    [
        ("words", "noise:0.1", {}),
        ("several", "noise:0.1", {}),
        ("twins", "flip@elsewhere", {}),
        ("whole", "crop:5", {}),
        ("series", "flip", {}),
        ("pixels", "crop:2", {}),
        ("pixels", "flip", {"loss": "mse"}),
        ("steps", "shift:0.1:0", {"ignore_label": VOID}),
        ("whole", "flip", {"loss": "huber"}),
    ],
)
def test_what_has_no_meaning_is_refused(model: str, augment: str, recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"recipe.augment: '{augment}'"):
        training_graph(model_of(model), Recipe(augment=(augment,), **recipe).features)


@pytest.mark.parametrize(
    ("model", "augment", "recipe"),
    [
        ("whole", ["flip", "crop:1"], {"loss": "bce"}),
        ("pixels", ["noise:0.1", "contrast:0.1"], {"loss": "mse"}),  # nothing moves
    ],
)
def test_labels_that_stay_have_no_fill(model: str, augment: list[str], recipe: dict[str, Any]) -> None:
    assert plan_of(model, *augment, **recipe).fill is None


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_board_trains_on_augmented_samples_and_labels(accumulate: int) -> None:
    """At a learning rate of 0 losses are those of torch, of the samples that the board's random numbers give."""
    augment = ("flip", "crop:2", "noise:0.1")
    recipe = Recipe(augment=augment, batch_size=8, lr=0.0, ignore_label=VOID, accumulate=accumulate)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((8, *IMAGE)).astype(np.float32), rng.integers(0, K, (8, H, W))
    graph = training_graph(model_of("pixels"), recipe.features)
    tensors = model_of("pixels").tensors
    task = TrainingTask(recipe, seed=7, device="d", round=1, classes=K)
    data = LocalData(x, y, x[:0], y[:0])
    got = Trainer(graph.to_bytes()).train(tensors, data, task)
    assert got.loss_first == Trainer(graph.to_bytes()).train(tensors, data, task).loss_first
    plan = AugmentPlan.from_json(graph.metadata[AUGMENT_METADATA])
    order, count = keyed_generator(7, 1, "d", "batches", 0).permutation(8), plan.random_count
    samples, labels = [], []
    for number, rows in enumerate(np.array_split(order, accumulate)):
        u = keyed_generator(7, 1, "d", "augment", 1, number).random((len(rows), count), np.float32)
        samples.append(augment_samples(plan, x[rows], u))
        labels.append(augment_labels(plan, y[rows], u))
    net = Pixels(whole=False)
    net.load_state_dict({n: torch.tensor(v) for n, v in tensors.items()})
    outputs = net(torch.tensor(np.concatenate(samples)))
    expected = functional.cross_entropy(outputs, torch.tensor(np.concatenate(labels)), ignore_index=VOID)
    assert got.loss_first == pytest.approx(float(expected.detach()), rel=1e-5)
    plain = Trainer(graph.to_bytes()).loss(tensors, data, recipe, K)
    assert plain != pytest.approx(got.loss_first, rel=1e-5)  # measured on samples as they are
