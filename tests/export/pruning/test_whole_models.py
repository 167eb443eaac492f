"""Whole networks: imported right, cut right at every density, differentiated right, and cut where they can be.

Those that take longest soak.
"""

from typing import Literal

import pytest
import torch

from fedprune.model.features import CUSTOM_LOSS, Features
from fedprune.model.selection import Selection
from fedprune_export.pruning.cut import cut
from fedprune_export.pruning.masked_reference import masked_graph
from support.marks import mark_soak
from support.nets import whole_models
from support.nets.whole_models import MODELS, OURS, TASKS
from support.oracles.cutting import distance, outputs, random_selection
from support.oracles.gradient_distance import TENSOR, Trained, of_rows
from support.oracles.torch_graph import run

pytestmark = pytest.mark.torch

LARGE = ("resnet18", "mobilenetv3_small_100", "vit_tiny_patch16_224", "convnext_atto")
LONG = (
    "adapted_encoder", "alibi", "attention_unet", "auto_encoder",
    "crnn", "d_linear", "deep_lab", "encoder", "fusion",
    "group_norm_resnet", "llama", "lstm", "n_beats",
    "patch_transformer", "pooled_video", "resnet20_bn",
    "tcn", "two_towers", "unet", "vgg11_bn", "wave_net", "yolo",
)  # fmt: skip
"""Torch takes 3 to 13 seconds to export one, or another network or test has the same wiring."""


NAMES = mark_soak((*OURS, *TASKS, *LARGE), soak=(*LARGE, *LONG))
BOUND = 1e-5
DENSITIES = (0.25, 0.5, 0.75, 0.001)
BATCHES = (2, 6)
SEEDS = 5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.at_push(6)
def test_the_import_computes_what_the_module_computes(name: str) -> None:
    """In float64: this also shows that the oracle of gradients runs graphs rightly."""
    model, x = whole_models.whole_model(name), torch.tensor(whole_models.samples(name, 6))
    module = MODELS[name].make().double().eval()
    state = {n: torch.tensor(v, dtype=torch.float64) for n, v in model.tensors.items()}
    with torch.no_grad():
        expected = of_rows(module, x.double() if x.is_floating_point() else x).numpy()
    assert distance(run(model.graph, state, x, training=False).numpy(), expected) < 1e-6
    assert distance(outputs(model.graph, x.numpy()), expected) < BOUND


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.at_push(6)
def test_a_cut_equals_the_masked_original(name: str) -> None:
    model = whole_models.whole_model(name)
    for density in DENSITIES:
        selection = random_selection(model, density, seed=int(density * 100))
        small, full = cut(model, selection), masked_graph(model, selection)
        for batch in BATCHES:
            x = whole_models.samples(name, batch)
            assert distance(outputs(small, x), outputs(full, x)) < BOUND, (density, batch)


@pytest.mark.parametrize("name", NAMES)
def test_so_much_can_be_cut(name: str) -> None:
    """A rule that is lost fixes channels, which is never wrong, but never right either."""
    model, bound = whole_models.whole_model(name), MODELS[name]
    half = random_selection(model, 0.5, seed=1).gather(model.tensors)
    kept_share = sum(v.size for v in half.values()) / sum(v.size for v in model.tensors.values())
    assert len(model.architecture.groups) >= bound.groups
    assert kept_share <= bound.kept_share


@pytest.mark.parametrize(
    ("name", "prefer"),
    mark_soak([*((name, "coarse") for name in (*OURS, *TASKS)), ("vision_transformer", "fine")], soak=LONG),
)
@pytest.mark.at_push(6)
def test_gradients_are_as_exact_as_torchs(name: str, prefer: Literal["coarse", "fine"]) -> None:
    """At full width beside the module, at half width beside the cut graph as torch runs and differentiates it."""
    model = whole_models.whole_model(name, prefer)
    of_values = Features(loss=CUSTOM_LOSS), lambda x, y: whole_models.squared_error(x, y).mean()
    trained = Trained(model, *(of_values if MODELS[name].values else ()))
    sizes = [6] * SEEDS
    if not any(n.op == "BatchNormalization" for n in model.graph.nodes):
        sizes += [1] * SEEDS
    batches = [
        (whole_models.samples(name, size, seed), whole_models.labels(name, size, seed))
        for seed, size in enumerate(sizes)
    ]
    half = random_selection(model, 0.5, seed=3)
    for net, selection in ((MODELS[name].make(), Selection.full(model.architecture)), (cut(model, half), half)):
        far = trained.distances(net, selection.gather(model.tensors), batches)
        assert far.is_near, (selection.is_full, far.ours, far.torch)
        assert far.excess(far.worst_tensor) <= TENSOR, (selection.is_full, far.worst_tensor)
