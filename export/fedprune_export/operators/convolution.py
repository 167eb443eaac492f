"""Conv and ConvTranspose: their channels, their form in a cut, and their gradients.

A convolution is three maps, each linear in what it is given: the convolution itself, the transposed convolution, and
the gradient of the kernel. Each operator is the gradient of the other with respect to its input, so that both use the
same three maps in different roles, in the fastest implementation (`choose_convolution`).

In channel rules a *row* has an *atom* (an integer) for each channel of an axis: tied atoms are kept or cut together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedprune_export.autodiff.column_convolution import ChannelGroups, ColumnConvolution
from fedprune_export.autodiff.depthwise_convolution import DepthwiseConvolution
from fedprune_export.autodiff.operator_convolution import Algorithms, OperatorConvolution, choose_algorithms
from fedprune_export.autodiff.sliding_window import Window, transposed_window, window
from fedprune_export.autodiff.tape import Dim, Pull, Shape, Tape, gradient_rule
from fedprune_export.channels.atoms import AtomRow, fixed_row
from fedprune_export.channels.choices import GROUPS, POSITIONS
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import INPUT, gradient_reads
from fedprune_export.pruning.masked_reference import MaskWriter, mask_rule
from fedprune_export.pruning.rewrites import Sizes, rewrite

gradient_reads(INPUT, "Conv", "ConvTranspose")


@channel_rule("Conv")
def conv_channels(channels: Channels, node: Node) -> None:
    """Tie inputs to the weight. Depthwise: channels are tied one to one, or one to several; grouped: by groups."""
    x, weight = channels.input_rows(node, 0)[1], channels.input_rows(node, 1)
    groups = int(node.attrs.get("group", 1))
    if groups == 1:
        channels.atoms.tie(weight[1], x)
        produced = weight[0]
    else:
        produced = _tie_groups(channels, node, x, weight[0], weight[1], groups)
    _set_output_channels(channels, node, produced)


@channel_rule("ConvTranspose")
def conv_transpose_channels(channels: Channels, node: Node) -> None:
    """Its weight has the input's channels first, then the outputs of one group."""
    x, weight = channels.input_rows(node, 0)[1], channels.input_rows(node, 1)
    groups = int(node.attrs.get("group", 1))
    channels.atoms.tie(weight[0], x)
    produced = weight[1] if groups == 1 else _tie_groups(channels, node, weight[0], None, weight[1], groups)
    _set_output_channels(channels, node, produced)


def _set_output_channels(channels: Channels, node: Node, produced: AtomRow) -> None:
    """Tie the bias, fix the spatial axes of input and kernel, and set the output's channels."""
    x = channels.input_rows(node, 0)
    if channels.has_input(node, 2):
        channels.atoms.tie(channels.input_rows(node, 2)[0], produced)
    kernel = channels.shape(node.inputs[1])[2:]
    channels.fix(channels.input_rows(node, 1)[2:])
    # A layer along tokens (gMLP) has each token's features on the spatial axis, and treats them alike.
    if _is_pointwise(node, kernel):
        channels.set_output(node, [x[0], produced, *x[2:]])
        return
    if any(row.any() for row in x[2:]):
        channels.notes.append(f"{node.op} {node.name} has channels on spatial axes: they stay.")
    # Spatial axes keep their sizes, so channels that lie on them stay.
    channels.fix(x[2:])
    channels.set_output(node, [x[0], produced, *(fixed_row(n) for n in channels.shape(node.outputs[0])[2:])])


def _is_pointwise(node: Node, kernel: Sequence[Dim]) -> bool:
    """Whether a convolution is the same product at every place, so that its map may have any size."""
    return (
        node.op == "Conv"
        and int(node.attrs.get("group", 1)) == 1
        and all(size == 1 for size in (*kernel, *node.attrs.get("strides", ())))
        and not any(node.attrs.get("pads", ()))
    )


def _tie_groups(
    channels: Channels, node: Node, read_row: AtomRow, written_row: AtomRow | None, inside: AtomRow, groups: int
) -> AtomRow:
    """Tie the channels that a grouped convolution can lose only together: a group, or a position of every group.

    `written_row`: output channels of all groups, where the weight has an axis of them (Conv); `inside`: the weight's
    axis of one group's channels: inputs (Conv) or outputs (ConvTranspose). Returns the output's channels.
    """
    blocks = read_row.reshape(groups, -1)
    # Without an axis of all outputs (ConvTranspose) each group has the same ones.
    outputs = written_row.reshape(groups, -1) if written_row is not None else np.tile(inside, (groups, 1))
    # Depthwise: groups of one channel have no positions to choose from.
    options = [GROUPS] if blocks.shape[1] == outputs.shape[1] == 1 else [GROUPS, POSITIONS]
    # Where each group reads one channel, cutting positions would cut no channel that is read: groups are tried first.
    option = channels.choices.next_option(node.outputs[0], options, ranked=blocks.shape[1] == 1)
    if option == GROUPS:
        first_of_group = blocks[:, :1]
        channels.atoms.tie(blocks, first_of_group)
        channels.atoms.fix(inside)
        if written_row is not None:
            channels.atoms.tie(outputs, first_of_group)
        produced = np.repeat(first_of_group[:, 0], outputs.shape[1])
        representatives = [first_of_group[:, 0]]
    elif option == POSITIONS:
        channels.atoms.tie(blocks, blocks[:1])
        if written_row is not None:
            channels.atoms.tie(inside, blocks[0])
            channels.atoms.tie(outputs, outputs[:1])
        produced = np.tile(outputs[0], groups)
        representatives = [blocks[0], outputs[0]]
    else:
        channels.fix([read_row, inside, outputs.reshape(-1)])
        return fixed_row(outputs.size)
    if len(options) > 1:
        channels.choices.expect_choice(node.outputs[0], option, representatives)
    return produced


@rewrite("Conv", "ConvTranspose")
def conv_rewrite(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Set the number of groups to the channels of all groups divided by those that the weight has of one group."""
    if int(node.attrs.get("group", 1)) > 1:
        all_groups = node.inputs[0] if node.op == "Conv" else node.outputs[0]
        node.attrs["group"] = (sizes.cut_sizes(all_groups)[1] or 0) // (sizes.cut_sizes(node.inputs[1])[1] or 1)


@mask_rule("Conv", "ConvTranspose")
def mask_contracted(masks: MaskWriter, node: Node) -> None:
    masks.apply(node, 0, [1])


@gradient_rule("Conv")
def conv(tape: Tape, node: Node) -> Pull:
    """y = x ∗ w + b in one or more dimensions, in any number of groups.

    Raises `ModelError` if groups don't keep equally many channels, or the size of the map varies and the kernel is
    larger than 1.
    """
    data, weight = node.inputs[:2]
    kernel, places = tape.shape(weight)[2:], tape.shape(data)[2:]
    if _is_pointwise(node, kernel) and not all(isinstance(size, int) for size in places):
        # A layer along the tokens of an MLP, for example. No algorithm of it reads the map's size.
        once = (1,) * len(places)
        w = Window(once, once, once, once, ((0, 0),) * len(places), once)
        outputs, inputs = tape.shape(weight)[:2]
        columns = _columns(tape, node, w, ChannelGroups(1, inputs, outputs))
        return _write_layer(tape, node, OperatorConvolution(columns, Algorithms("flipped", "taps")), (outputs, *places))
    w = window(tape, node, tape.static(node, kernel))
    number, inputs = _groups(tape, node, data, 1)
    _, outputs = _groups(tape, node, weight, 0)
    layer = choose_convolution(tape, node, w, ChannelGroups(number, inputs, outputs))
    return _write_layer(tape, node, layer, (tape.shape(weight)[0], *w.output))


@gradient_rule("ConvTranspose")
def conv_transpose(tape: Tape, node: Node) -> Pull:
    """The gradient of a convolution as a layer; the gradient of this layer is that convolution.

    Raises `ModelError` if groups don't keep equally many channels, or the size of the map varies.
    """
    w = transposed_window(tape, node)
    # The roles are swapped: what this node reads is the output of the convolution that it reverses.
    number, outputs = _groups(tape, node, node.inputs[0], 1)
    inputs = tape.shape(node.inputs[1])[1]
    layer = choose_convolution(tape, node, w, ChannelGroups(number, inputs, outputs))
    return _write_layer(tape, node, layer, (tape.product([number, inputs]), *w.sizes))


def _groups(tape: Tape, node: Node, name: str, axis: int) -> tuple[Dim, Dim]:
    """How many groups an axis of channels has, and how long they are."""
    groups = int(node.attrs.get("group", 1))
    return tape.block_layout(node, name, axis, groups) if groups > 1 else (1, tape.shape(name)[axis])


# A convolution with its window and kernel, which has three methods. x is what the window slides over, [N, inputs, ...];
# y has one element per position of the window, [N, outputs, ...]. A bias is a list of one vector, or empty.
# - `apply(x, bias)`: y = x ∗ kernel + bias.
# - `apply_transposed(dy, bias)`: the transposed convolution of dy, which is the gradient of x, + bias.
# - `kernel_gradient(x, dy)`: the gradient of the kernel.
Convolution = OperatorConvolution | DepthwiseConvolution | ColumnConvolution


def _write_layer(tape: Tape, node: Node, layer: Convolution, sizes: Shape) -> Pull:
    """Write a Conv or ConvTranspose, whose output has these sizes behind the batch."""
    data, weight, bias = [*node.inputs, ""][:3]
    x, is_transposed = tape.value(data), node.op == "ConvTranspose"
    maps: list[Callable[[str, list[str]], str]] = [layer.apply, layer.apply_transposed]
    apply, apply_back = maps[::-1] if is_transposed else maps
    y = apply(x, [tape.value(bias)] if bias else [])
    tape.enter(node.outputs[0], y, (tape.shape(data)[0], *sizes))

    def pull(dy: str) -> None:
        if bias and tape.needs_gradient(bias):
            axes = tape.graph.ints(0, *range(2, len(tape.shape(data))))
            tape.add_gradient(bias, tape.graph.emit("ReduceSum", dy, axes, attrs={"keepdims": 0}))
        if tape.needs_gradient(weight):
            tape.add_gradient(weight, layer.kernel_gradient(*((dy, x) if is_transposed else (x, dy))))
        if tape.needs_gradient(data):
            tape.add_gradient(data, apply_back(dy, []))

    return pull


def choose_convolution(tape: Tape, node: Node, w: Window, groups: ChannelGroups) -> Convolution:
    """The fastest implementation of the layer that a Conv or ConvTranspose node is."""
    if int(node.attrs.get("group", 1)) > 1 and groups[1:] == (1, 1):
        return DepthwiseConvolution(tape.graph, w, tape.value(node.inputs[1]))
    columns, algorithms = _columns(tape, node, w, groups), choose_algorithms(tape, w, groups)
    return OperatorConvolution(columns, algorithms) if algorithms is not None else columns


def _columns(tape: Tape, node: Node, w: Window, groups: ChannelGroups) -> ColumnConvolution:
    data, weight = node.inputs[:2]
    return ColumnConvolution(tape, w, tape.value(weight), tape.shape(weight), groups, tape.shape(data)[0])
