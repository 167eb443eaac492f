"""The last layer of a model: the one that makes its outputs."""

from __future__ import annotations

from collections.abc import Collection
from glob import escape

from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture, TensorKind

HEAD = "@head"
"""A pattern that stands for the last layer's tensors, where tensors are named by patterns."""


def head_axes(architecture: Architecture) -> dict[str, int]:
    """The last layer's tensors, with the axis of each along which the outputs are.

    That is the last layer with a weight whose outputs no cut may touch, and its bias: of all biases as long as there
    are outputs the one that is called like the layer, or else the first behind its weight. Raises `BundleError` if
    there is none.
    """
    for layer in reversed(architecture.layers):
        spec = architecture.by_name.get(layer.weight)
        if spec is None or not spec.axes or spec.axes[layer.output_axis].groups:
            continue
        outputs = spec.axes[layer.output_axis].length
        if architecture.classes and outputs != architecture.classes:
            continue
        out = {spec.name: layer.output_axis}
        names = [t.name for t in architecture.tensors]
        biases = [
            t.name for t in architecture.tensors if t.kind is TensorKind.BIAS and t.shape == (outputs,)
            and not t.axes[0].groups
        ]  # fmt: skip
        prefix = spec.name.rpartition(".")[0]
        named = [b for b in biases if prefix and b.rpartition(".")[0] == prefix]
        behind = [b for b in biases if names.index(b) > names.index(spec.name)]
        out.update(dict.fromkeys((named or behind)[:1], 0))
        return out
    raise BundleError("the model has no last layer with weights of its own", hint="Name its tensors yourself.")


def spelt(patterns: Collection[str], architecture: Architecture) -> tuple[str, ...]:
    """Patterns of tensors with `@head` spelt out. Raises `BundleError` if `@head` is among them, and the model has
    no last layer."""
    out: list[str] = []
    for pattern in patterns:
        out += [escape(n) for n in head_axes(architecture)] if pattern == HEAD else [pattern]
    return tuple(out)
