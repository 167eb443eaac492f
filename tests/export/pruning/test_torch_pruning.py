"""Channel groups beside Torch-Pruning's, and networks that it has physically pruned beside our cuts.

Where groups differ, the table says how and why: Torch-Pruning breaks a network by one channel of such a group. (That
our cuts of all of them equal the masked originals is tested with the whole networks.) Networks that torch takes long
to export are left to soaks.
"""

from dataclasses import dataclass

import pytest
import torch

from fedprune_export.pruning.cut import cut
from support.marks import mark_soak
from support.nets import whole_models
from support.nets.whole_models import MODELS
from support.oracles.cutting import distance, outputs, random_selection
from support.oracles.physical_pruning import lines, our_groups, outputs_of, prune, their_groups

pytestmark = pytest.mark.torch

EQUAL = mark_soak(
    (
        "lenet",
        "vgg11_bn",
        "resnet20_bn",
        "concat_net",
        "squeeze_and_excite",
        "conv_mixer",
        "perceptron",
        "resnet18",
        "mobilenetv3_small_100",
        "convnext_atto",
    ),
    soak=[
        "vgg11_bn",
        "resnet20_bn",
        "concat_net",
        "squeeze_and_excite",
        "resnet18",
        "mobilenetv3_small_100",
        "convnext_atto",
    ],
)
"""Networks whose groups are the same, layer by layer."""


@dataclass(frozen=True)
class Difference:
    """Groups that only one of both finds: so many channels, and the sides of layers that they touch."""

    why: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]


DIFFERENT: dict[str, Difference] = {
    "gate": Difference(
        "A map of one channel is multiplied with 32 channels: they are not tied to it.",
        ("32: a.out, b.in, gate.in",),
        ("1: a.out, b.in, gate.in, gate.out",),
    ),
    "chunk_and_concat": Difference(
        "Each third of a layer's channels is a group of its own, and so is each part of a concatenation.",
        ("12: b.out, last.in", "8: a.out, b.in", "8: a.out, c.in", "8: a.out, last.in", "8: c.out, last.in"),
        ("8: a.out, b.out, c.out, last.in",),
    ),
    "glu": Difference(
        "A channel and its gate are one unit of two rows; Torch-Pruning takes either row alone.",
        ("16: a.out, b.in", "20: fc1.out, fc2.in", "24: b.out, fc1.in"),
        ("32: a.out, b.in", "40: fc1.out, fc2.in", "48: b.out, fc1.in"),
    ),
    "group_norm_resnet": Difference(
        "The unit is a group of the normalisation: cutting inside one changes its statistics.",
        (
            "4: blocks.0.conv1.in, blocks.0.conv2.out, blocks.1.conv1.in, blocks.1.shortcut.in, stem.out",
            "4: blocks.0.conv1.out, blocks.0.conv2.in",
            "4: blocks.1.conv1.out, blocks.1.conv2.in",
            "4: blocks.1.conv2.out, blocks.1.shortcut.out, blocks.2.conv1.in, blocks.2.conv2.out, fc.in",
            "4: blocks.2.conv1.out, blocks.2.conv2.in",
        ),
        (
            "16: blocks.0.conv1.in, blocks.0.conv2.out, blocks.1.conv1.in, blocks.1.shortcut.in, stem.out",
            "16: blocks.0.conv1.out, blocks.0.conv2.in",
            "32: blocks.1.conv1.out, blocks.1.conv2.in",
            "32: blocks.1.conv2.out, blocks.1.shortcut.out, blocks.2.conv1.in, blocks.2.conv2.out, fc.in",
            "32: blocks.2.conv1.out, blocks.2.conv2.in",
        ),
    ),
    "vision_transformer": Difference(
        "The unit is a head: its rows of queries, keys and values. Torch-Pruning takes one row of them.",
        (
            "3: blocks.0.attention.proj.in, blocks.0.attention.qkv.out",
            "3: blocks.1.attention.proj.in, blocks.1.attention.qkv.out",
        ),
        (
            "72: blocks.0.attention.proj.in, blocks.0.attention.qkv.out",
            "72: blocks.1.attention.proj.in, blocks.1.attention.qkv.out",
        ),
    ),
}
"""Networks that both can analyse, with different results."""

"""Networks that Torch-Pruning can't analyse, and ours can."""

UNSEEN = {
    "lstm": ("16: fc.in",),
    "encoder": ("4: encoder.layers.0.self_attn.out_proj.in", "4: encoder.layers.1.self_attn.out_proj.in"),
}
"""Channels that Torch-Pruning, asked for groups of convolutions and dense layers, doesn't list: hidden units, heads."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.at_push(3)
def test_groups_are_the_same(name: str) -> None:
    module = MODELS[name].make()
    assert our_groups(whole_models.whole_model(name).architecture, module) == their_groups(module)


@pytest.mark.parametrize("name", EQUAL)
def test_a_cut_computes_what_a_physically_pruned_network_computes(name: str) -> None:
    model, x = whole_models.whole_model(name), whole_models.samples(name, 6)
    selection = random_selection(model, 0.5, seed=9)
    expected = outputs_of(prune(MODELS[name].make(), selection), x)
    assert distance(outputs(cut(model, selection), x), expected) < 1e-5


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.at_push(3)
def test_differences_are_the_known_ones(name: str) -> None:
    module, expected = MODELS[name].make(), DIFFERENT[name]
    ours, theirs = our_groups(whole_models.whole_model(name).architecture, module), their_groups(module)
    assert lines(ours - theirs) == sorted(expected.ours)
    assert lines(theirs - ours) == sorted(expected.theirs)


def test_whole_groups_of_a_normalisation_pruned_by_hand_are_our_cut() -> None:
    """Torch-Pruning leaves their number as it was; with the right one its network is ours."""
    name = "group_norm_resnet"
    model, x = whole_models.whole_model(name), whole_models.samples(name, 6)
    selection = random_selection(model, 0.5, seed=9)
    logits = outputs(cut(model, selection), x)
    module = prune(MODELS[name].make(), selection)
    assert distance(logits, outputs_of(module, x)) > 1e-2
    for module_layer in module.modules():
        if isinstance(module_layer, torch.nn.GroupNorm):
            module_layer.num_groups //= 2
    assert distance(logits, outputs_of(module, x)) < 1e-5


@pytest.mark.parametrize("name", mark_soak(UNSEEN, soak=["encoder"]))
def test_channels_that_torch_pruning_does_not_list(name: str) -> None:
    module = MODELS[name].make()
    ours, theirs = our_groups(whole_models.whole_model(name).architecture, module), their_groups(module)
    assert set(UNSEEN[name]) <= set(lines(ours - theirs))
