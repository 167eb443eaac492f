"""Self-distillation: against torch, in whom it moves and in whom it doesn't, and as a part of a round."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedprune_export as fx
from fedprune.core.rng import keyed_generator
from fedprune.core.tensorfile import encode
from fedprune.model.architecture import widths_at
from fedprune.model.nesting import nest_widths
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.strategies.importance.scoring import order_scores, rank_channels
from fedprune.strategies.values import SelfDistillation
from fedprune_export.pruning.model import Model
from fedprune_server.executor.calibration import Calibration
from fedprune_server.executor.distillation import Distiller
from fedprune_server.simulation.digits import load_digits

SETTINGS = SelfDistillation(20, (0.25, 0.5, 0.75), 3e-4)
X, Y = load_digits()


class Net(nn.Module):
    """Two layers whose hidden channels can be cut."""

    input_shape = (6,)

    def __init__(self, outputs: int = 3, *, normalised: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, outputs)
        self.norm = nn.BatchNorm1d(8) if normalised else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.two(torch.relu(self.norm(self.one(x))))
        return out


def small_model(outputs: int = 3, *, normalised: bool = False) -> Model:
    torch.manual_seed(1)
    return fx.load(Net(outputs, normalised=normalised))


def inputs(count: int = 40) -> np.ndarray[Any, Any]:
    return keyed_generator(0, "inputs").standard_normal((count, 6)).astype(np.float32)


def distiller(model: Model, x: Any, settings: SelfDistillation = SETTINGS, recipe: Recipe | None = None) -> Distiller:
    recipe = recipe or Recipe()
    return Distiller(model, Calibration(model, x, recipe.features), settings, recipe, 0)


def own_ranking(model: Model) -> Any:
    return rank_channels(order_scores(model.architecture))


def is_same(one: Tensors, another: Tensors) -> bool:
    return encode(one) == encode(another)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("width", "normalised"),
    [(4, False), (8, True), *(pytest.param(*row, marks=pytest.mark.soak) for row in ((4, True), (8, False)))],
)
def test_a_step_is_torchs(width: int, *, normalised: bool) -> None:
    """At half and at full width: the mean of three widths' outputs as labels, and Adam."""
    model, x = small_model(normalised=normalised), inputs()
    order = np.array([3, 1, 7, 5, 0, 2, 4, 6])
    settings = SelfDistillation(1, (0.25, 0.5), 0.01)
    round_ = next(
        n for n in range(1, 100) if (8, 2, 4)[int(keyed_generator(0, n, "", "widths", 1).integers(3))] == width
    )
    distilled = distiller(model, x, settings)(model.tensors, [order], round_)

    parameters = {n: torch.from_numpy(v.copy()).requires_grad_("running" not in n) for n, v in model.tensors.items()}
    samples = torch.from_numpy(x)

    def outputs(channels: int, *, unbiased: bool) -> torch.Tensor:
        channel_order = torch.from_numpy(order[:channels])
        hidden = samples @ parameters["one.weight"][channel_order].T + parameters["one.bias"][channel_order]
        if normalised:
            spread = hidden.var(0, unbiased=unbiased)
            hidden = (hidden - hidden.mean(0)) / (spread + 1e-5).sqrt() * parameters["norm.weight"][channel_order]
            hidden = hidden + parameters["norm.bias"][channel_order]
        return torch.relu(hidden) @ parameters["two.weight"][:, channel_order].T + parameters["two.bias"]

    with torch.no_grad():
        mean_output = (sum(outputs(channels, unbiased=True) for channels in (2, 4, 8)) / 3).softmax(1)
    trained = [v for v in parameters.values() if v.requires_grad]
    loss = nn.functional.cross_entropy(outputs(width, unbiased=False), mean_output)
    optimizer = torch.optim.Adam(trained, lr=0.01, eps=1e-3)
    loss.backward()
    optimizer.step()
    for name, value in parameters.items():
        if value.requires_grad and (name != "one.bias" or not normalised):  # whose gradient is 0, up to rounding
            np.testing.assert_allclose(distilled[name], value.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_widths_that_agree_stay_as_they_are() -> None:
    """In a nested start all widths answer alike: there is nothing to learn."""
    model = small_model()
    start = nest_widths(
        model.architecture, model.tensors, [widths_at(model.architecture, d) for d in SETTINGS.densities]
    )
    distilled = distiller(model, inputs())(start, own_ranking(model), 1)
    assert max(float(np.abs(distilled[n] - start[n]).max()) for n in start) < 1e-5
    assert not is_same(distiller(model, inputs())(model.tensors, own_ranking(model), 1), model.tensors)


def test_bits_depend_on_seed_and_round_alone(model: Model) -> None:
    x, settings = X[:100], SelfDistillation(3, (0.5,), 3e-4)
    order = own_ranking(model)
    distil = distiller(model, x, settings)
    first_round = distil(model.tensors, order, 1)
    assert not is_same(distil(model.tensors, order, 2), first_round)
    assert is_same(distil(model.tensors, order, 1), first_round)
    assert is_same(distiller(model, x[::-1], settings)(model.tensors, order, 1), first_round)
    other_seed = Distiller(model, Calibration(model, x, Recipe().features), settings, Recipe(), 1)
    assert not is_same(other_seed(model.tensors, order, 1), first_round)


@pytest.mark.parametrize(
    ("recipe", "moves"),
    [
        (Recipe(frozen=("one.*",)), ("two", "norm")),
        (Recipe(frozen=("norm.*", "two.bias")), ("one", "two.weight")),
        (Recipe(trainable=("two.*",)), ("two",)),
    ],
)
def test_what_is_frozen_stays(recipe: Recipe, moves: tuple[str, ...]) -> None:
    model = small_model(normalised=True)
    distilled = distiller(model, inputs(), recipe=recipe)(model.tensors, own_ranking(model), 1)
    for name, value in model.tensors.items():
        assert np.array_equal(distilled[name], value) != name.startswith(moves), name


def test_where_the_strategy_names_no_widths_those_learn_that_boards_have_trained() -> None:
    model, x = small_model(), inputs()
    core, ranking = widths_at(model.architecture, 0.5), own_ranking(model)
    unnamed = distiller(model, x, replace(SETTINGS, densities=()))
    assert is_same(unnamed(model.tensors, ranking, 1, {core}), model.tensors), "one width has none to learn from"
    for distil, trained in ((unnamed, {core, model.architecture.sizes}), (distiller(model, x), {core})):
        assert not is_same(distil(model.tensors, ranking, 1, trained), model.tensors)


def test_a_model_that_diverges_stays_as_it_is() -> None:
    model = small_model()
    broken = {n: v * np.float32(1e30) for n, v in model.tensors.items()}
    assert is_same(distiller(model, inputs())(broken, own_ranking(model), 1), broken)
