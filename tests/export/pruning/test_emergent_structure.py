"""Networks cut to what an element mask leaves alive: they predict and train as the masked whole ones do."""

from dataclasses import replace

import numpy as np
import pytest

from fedprune.model import step_contract
from fedprune.model.element_mask import apply_mask, gather_mask
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ElementMask, Selection, Tensors
from fedprune.model.step_feeds import first_step_feeds
from fedprune.runtime.session import OnnxSession
from fedprune.strategies.importance.element_ranking import prunable
from fedprune.strategies.importance.structured_from_mask import surviving_selection, survivors
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.cut import cut
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.nets.small_nets import LeNet, randomise_norms
from support.oracles.cutting import distance, inputs, outputs

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def model() -> Model:
    return import_onnx(export_torch(randomise_norms(LeNet())), "lenet")


def masked(model: Model, seed: int) -> tuple[ElementMask, Tensors]:
    """A mask of single weights, whole filters and whole inputs, and the model's weights under it, without biases."""
    random, architecture = np.random.default_rng(seed), model.architecture
    active = {}
    for name in prunable(architecture):
        shape = architecture.by_name[name].shape
        rest = (1,) * (len(shape) - 2)
        bits = random.random(shape) < 0.7
        bits &= random.random((shape[0], 1, *rest)) < 0.7
        active[name] = bits & (random.random((1, shape[1], *rest)) < 0.9)
    mask = active
    return mask, apply_mask(mask, {n: np.zeros_like(v) if n.endswith("bias") else v for n, v in model.tensors.items()})


def with_weights(model: Model, weights: Tensors) -> Model:
    graph = model.graph.copy()
    graph.initializers.update(weights)
    return replace(model, graph=graph)


@pytest.mark.parametrize("seed", range(4))
def test_the_cut_net_predicts_what_the_masked_one_does(model: Model, seed: int) -> None:
    mask, weights = masked(model, seed)
    selection = surviving_selection(Selection.full(model.architecture), survivors(model.architecture, mask))
    assert sum(selection.widths) < sum(model.architecture.sizes)
    full, x = with_weights(model, weights), inputs(model, 5)
    assert distance(outputs(cut(full, selection), x), outputs(full.graph, x)) < 1e-5


def test_a_step_of_the_cut_net_is_that_of_the_masked_one(model: Model) -> None:
    mask, weights = masked(model, 0)
    selection = surviving_selection(Selection.full(model.architecture), survivors(model.architecture, mask))
    recipe = Recipe(mask="hard", weight_decay=0.01, proximal=0.1, lr=0.1)
    session = OnnxSession(training_graph(model, recipe.features).to_bytes(), training=True)
    x, y = inputs(model, 6), np.arange(6)

    def after(tensors: Tensors, bits: ElementMask) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        fed = {step_contract.X: x, step_contract.Y: y, **first_step_feeds(recipe, tensors, session.inputs, y, 10)}
        fed |= {step_contract.mask_name(n): m.astype(np.float32) for n, m in bits.items()}
        got = session.run(fed)
        return {n: got[step_contract.next_name(n)] for n in tensors} | {"loss": got[step_contract.LOSS]}

    stepped = after(weights, mask)
    small = after(selection.gather(weights), gather_mask(mask, selection))
    assert small.pop("loss") == pytest.approx(float(stepped.pop("loss")), rel=1e-5)
    for name, value in selection.gather(stepped).items():
        np.testing.assert_allclose(small[name], value, atol=1e-6, err_msg=name)
    for name, bits in mask.items():
        assert not stepped[name][~bits].any()
