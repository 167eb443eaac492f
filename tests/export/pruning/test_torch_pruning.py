"""Channel groups beside Torch-Pruning's, and networks that it has physically pruned beside our cuts.

Where groups differ, the table says how and why; what becomes of the network when Torch-Pruning prunes one channel of
such a group decides who is right. (That our cuts of all of them equal the masked originals is tested with the whole
networks.) Networks that torch takes long to export are left to soaks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedprune.model.selection import Selection
from fedprune_export.pruning.cut import cut
from support.marks import marked
from support.nets import whole_models
from support.nets.whole_models import MODELS
from support.oracles.cutting import distance, outputs, random_selection
from support.oracles.physical_pruning import lines, our_groups, outputs_of, prune, their_groups, verdicts

pytestmark = pytest.mark.torch

EQUAL = marked(
    (
        "lenet",
        "vgg11_bn",
        "resnet20_bn",
        "concat_net",
        "unet",
        "sensor_net",
        "squeeze_and_excite",
        "inception",
        "conv_mixer",
        "video",
        "perceptron",
        "resnet18",
        "mobilenetv3_small_100",
        "convnext_atto",
    ),
    soak=[
        "vgg11_bn",
        "resnet20_bn",
        "concat_net",
        "unet",
        "squeeze_and_excite",
        "inception",
        "resnet18",
        "mobilenetv3_small_100",
        "convnext_atto",
    ],
)
"""Networks whose groups are the same, layer by layer."""


@dataclass(frozen=True)
class Difference:
    """Groups that only one of both finds: so many channels, and the sides of layers that they touch.

    Attributes:
        why: What the difference is.
        ours: Groups that only our analysis has.
        theirs: Groups that only Torch-Pruning has, each with what becomes of the network without one of its channels.
    """

    why: str
    ours: tuple[str, ...]
    theirs: dict[str, str]


DIFFERENT: dict[str, Difference] = {
    "gate": Difference(
        "A map of one channel is multiplied with 32 channels: they are not tied to it.",
        ("32: a.out, b.in, gate.in",),
        {"1: a.out, b.in, gate.in, gate.out": "fails"},
    ),
    "chunk_and_concat": Difference(
        "Each third of a layer's channels is a group of its own, and so is each part of a concatenation.",
        ("12: b.out, last.in", "8: a.out, b.in", "8: a.out, c.in", "8: a.out, last.in", "8: c.out, last.in"),
        {"8: a.out, b.out, c.out, last.in": "fails"},
    ),
    "glu": Difference(
        "A channel and its gate are one unit of two rows; Torch-Pruning takes either row alone.",
        ("16: a.out, b.in", "20: fc1.out, fc2.in", "24: b.out, fc1.in"),
        {"32: a.out, b.in": "fails", "40: fc1.out, fc2.in": "fails", "48: b.out, fc1.in": "fails"},
    ),
    "feature_pyramid": Difference(
        "A pixel shuffle makes one channel of four.",
        ("4: last.in, smooth.0.out",),
        {"16: last.in, smooth.0.out": "fails"},
    ),
    "padded_shortcuts": Difference(
        "Four channels of noughts before the shortcut's: channel c of the stem meets channel c + 4 of the block. The "
        "other eight of the block stay. Torch-Pruning takes c with c.",
        ("8: a1.0.in, a2.0.out, b1.0.in, b2.0.out, fc.in, stem.0.out",),
        {"16: a1.0.in, a2.0.out, b1.0.in, b2.0.out, fc.in, stem.0.out": "differs"},
    ),
    "mlp_mixer": Difference(
        "Dense layers over places have places, not channels, on both sides.",
        ("20: channel1.in, channel2.out, head.in, patches.out",),
        {"20: channel1.in, channel2.out, head.in, patches.out, token1.in, token2.out": "fails"},
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
        {
            "16: blocks.0.conv1.in, blocks.0.conv2.out, blocks.1.conv1.in, blocks.1.shortcut.in, stem.out": "fails",
            "16: blocks.0.conv1.out, blocks.0.conv2.in": "fails",
            "32: blocks.1.conv1.out, blocks.1.conv2.in": "fails",
            "32: blocks.1.conv2.out, blocks.1.shortcut.out, blocks.2.conv1.in, blocks.2.conv2.out, fc.in": "fails",
            "32: blocks.2.conv1.out, blocks.2.conv2.in": "fails",
        },
    ),
    "grouped": Difference(
        "The unit is a whole group of the convolution, with its inputs.",
        ("4: expand.0.in, grouped.0.out, reduce.0.out",),
        {"24: expand.0.in, grouped.0.out": "fails", "24: grouped.0.in, reduce.0.out": "fails"},
    ),
    "vision_transformer": Difference(
        "The unit is a head: its rows of queries, keys and values. Torch-Pruning takes one row of them.",
        (
            "3: blocks.0.attention.proj.in, blocks.0.attention.qkv.out",
            "3: blocks.1.attention.proj.in, blocks.1.attention.qkv.out",
        ),
        {
            "72: blocks.0.attention.proj.in, blocks.0.attention.qkv.out": "fails",
            "72: blocks.1.attention.proj.in, blocks.1.attention.qkv.out": "fails",
        },
    ),
    "swin": Difference(
        "As in a vision transformer.",
        ("2: one.proj.in, one.qkv.out", "2: two.proj.in, two.qkv.out", "4: three.proj.in, three.qkv.out"),
        {
            "36: one.proj.in, one.qkv.out": "fails",
            "36: two.proj.in, two.qkv.out": "fails",
            "72: three.proj.in, three.qkv.out": "fails",
        },
    ),
}
"""Networks that both can analyse, with different results."""

REFUSED = {
    "shufflenet_v2": "Torch-Pruning fails on a reshape that takes channels apart (a division by nought).",
    "gru": "Torch-Pruning follows a recurrent layer of two directions into an index that isn't there.",
}
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
    assert our_groups(whole_models.imported(name).architecture, module) == their_groups(module)


@pytest.mark.parametrize("name", EQUAL)
def test_a_cut_computes_what_a_physically_pruned_network_computes(name: str) -> None:
    model, x = whole_models.imported(name), whole_models.samples(name, 6)
    selection = random_selection(model, 0.5, seed=9)
    expected = outputs_of(prune(MODELS[name].make(), selection), x)
    assert distance(outputs(cut(model, selection), x), expected) < 1e-5


@pytest.mark.parametrize(
    "name", marked(DIFFERENT, soak=["swin", "feature_pyramid", "padded_shortcuts", "mlp_mixer", "grouped"])
)
@pytest.mark.at_push(3)
def test_differences_are_the_known_ones(name: str) -> None:
    module, known = MODELS[name].make(), DIFFERENT[name]
    ours, theirs = our_groups(whole_models.imported(name).architecture, module), their_groups(module)
    assert lines(ours - theirs) == sorted(known.ours)
    assert lines(theirs - ours) == sorted(known.theirs)


@pytest.mark.parametrize("name", marked(DIFFERENT, soak=["swin"]))
@pytest.mark.at_push(4)
def test_where_groups_differ_theirs_are_wrong(name: str) -> None:
    found = verdicts(MODELS[name].make, whole_models.samples(name, 6))
    assert {text: found[text] for text in DIFFERENT[name].theirs} == DIFFERENT[name].theirs


@pytest.mark.parametrize("name", marked(["squeeze_and_excite", "concat_net", "unet"], soak=["unet"]))
def test_where_groups_are_the_same_theirs_are_right(name: str) -> None:
    """The verdict itself can say "equal"."""
    assert set(verdicts(MODELS[name].make, whole_models.samples(name, 6)).values()) == {"equal"}


def test_both_rows_of_a_gated_unit_pruned_by_hand_are_our_cut() -> None:
    """Told to prune a channel with its gate, Torch-Pruning makes the network that we make."""
    model, x = whole_models.imported("glu"), whole_models.samples("glu", 6)
    selection = random_selection(model, 0.5, seed=9)
    expected = outputs_of(prune(MODELS["glu"].make(), selection), x)
    assert distance(outputs(cut(model, selection), x), expected) < 1e-5


def test_whole_groups_of_a_normalisation_pruned_by_hand_are_our_cut() -> None:
    """Torch-Pruning leaves their number as it was; with the right one its network is ours."""
    name = "group_norm_resnet"
    model, x = whole_models.imported(name), whole_models.samples(name, 6)
    selection = random_selection(model, 0.5, seed=9)
    found = outputs(cut(model, selection), x)
    module = prune(MODELS[name].make(), selection)
    assert distance(found, outputs_of(module, x)) > 1e-2
    for part in module.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.num_groups //= 2
    assert distance(found, outputs_of(module, x)) < 1e-5


@pytest.mark.parametrize(
    ("name", "projection"), marked([("vision_transformer", "blocks.{}.attention"), ("swin", "{}")], soak=["swin"])
)
def test_lost_heads_are_heads_that_nobody_reads(name: str, projection: str) -> None:
    """With all else kept, cutting heads is cutting what the projection after them reads."""
    model, x = whole_models.imported(name), whole_models.samples(name, 6)
    architecture = model.architecture
    ends = {"vision_transformer": ("0", "1"), "swin": ("one", "two", "three")}[name]
    readers = [projection.format(end) + ".proj.weight" for end in ends]
    heads = [architecture.by_name[r].axes[1].groups[0] for r in readers]
    widths = [1 if i in heads else n for i, n in enumerate(architecture.sizes)]
    rng = np.random.default_rng(1)
    selection = Selection.of(architecture, widths, [rng.permutation(n) for n in architecture.sizes])
    module = MODELS[name].make()
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for reader in readers:
            gone = ~selection.covered(reader).any(0)
            assert gone.any()
            parameters[reader][:, gone] = 0
    assert distance(outputs(cut(model, selection), x), outputs_of(module, x)) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", marked(REFUSED, soak=["gru"]))
def test_what_torch_pruning_cannot_analyse_we_can(name: str) -> None:
    with pytest.raises((ZeroDivisionError, IndexError)):
        their_groups(MODELS[name].make())
    assert whole_models.imported(name).architecture.groups


@pytest.mark.parametrize("name", marked(UNSEEN, soak=["encoder"]))
def test_channels_that_torch_pruning_does_not_list(name: str) -> None:
    module = MODELS[name].make()
    ours, theirs = our_groups(whole_models.imported(name).architecture, module), their_groups(module)
    assert set(UNSEEN[name]) <= set(lines(ours - theirs))
