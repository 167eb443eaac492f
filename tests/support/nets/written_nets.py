"""Architectures that tests write down: axes by the names of their channel groups, and by sizes."""

from collections.abc import Mapping, Sequence

from fedprune.model.architecture import Architecture, ChannelGroup, TensorKind, TensorSpec
from fedprune.model.axis import Axis, Segment
from fedprune.model.cost_table import Activation, LayerRow

Length = int | str | tuple[str, int]
"""Fixed indices, all channels of a group, or these with so many indices each."""


def written_net(
    groups: Mapping[str, int],
    tensors: Mapping[str, Sequence[Length]],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    *,
    name: str = "net",
    kinds: Mapping[str, TensorKind] | None = None,
    layers: Sequence[str] | None = None,
    positions: int = 1,
    activations: Mapping[str, tuple[str, int]] | None = None,
) -> Architecture:
    """A net whose tensors are weights, but for `kinds`.

    Args:
        layers: The weights of its layers; all weights if not named.
        positions: Places of a convolution's map.
        activations: Groups and places of values that are kept.
    """
    order = list(groups)

    def axis(length: Length) -> Axis:
        if isinstance(length, int):
            return Axis.fixed(length)
        group, inner = (length, 1) if isinstance(length, str) else length
        return Axis((Segment(order.index(group), 0, groups[group], inner),))

    def row(weight: str) -> LayerRow:
        is_conv = len(tensors[weight]) == 4
        return LayerRow(
            weight.removesuffix(".weight"), "Conv" if is_conv else "Gemm", weight, positions if is_conv else 1
        )

    specs = [TensorSpec(n, (kinds or {}).get(n, TensorKind.WEIGHT), tuple(map(axis, at))) for n, at in tensors.items()]
    weights = [spec.name for spec in specs if spec.kind is TensorKind.WEIGHT] if layers is None else layers
    return Architecture(
        name,
        tuple(ChannelGroup(n, size) for n, size in groups.items()),
        tuple(specs),
        tuple(map(row, weights)),
        tuple(Activation(n, axis(group), count, True) for n, (group, count) in (activations or {}).items()),
        inputs,
        outputs,
    )
