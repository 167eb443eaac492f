"""Augmentations of training samples as graphs of samples and random numbers, and the same of labels that are places."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedprune.core.errors import ConfigError, shape_text
from fedprune.core.text import some
from fedprune.model.augmentation import GEOMETRIC, Augmentation
from fedprune.model.recipe import JUDGED, MULTI, Features, labels_of
from fedprune.model.step_contract import AUGMENT_X, AUGMENT_Y, AUGMENTED, NUMBERS, X, Y
from fedprune_export.importing.packing import INPUTS_KEY, Piece, pieces
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.ir.trace import sample_sizes
from fedprune_export.pruning.model import Model

_INT32 = 6  # ONNX's number of the type


@dataclass(frozen=True)
class _Step:
    """An augmentation of one input.

    Attributes:
        text: Its entry in the recipe.
        first: The first of its random numbers.
        axes: Axes of the values that it moves, from the last one: -1, -2, ...
    """

    text: str
    name: str
    values: tuple[float, ...]
    piece: Piece
    first: int
    axes: tuple[int, ...]

    @property
    def moves(self) -> bool:
        return self.name in GEOMETRIC

    @property
    def numbers(self) -> int:
        """Random numbers that it needs for a sample."""
        return {"flip": 1, "crop": 2, "noise": 2 * -(-self.piece.size // 2), "specaugment": 4}.get(self.name, 1)


def embedded_augmentation(model: Model, labels: Port, features: Features) -> dict[str, str]:
    """The graphs of `step_contract.AUGMENT_X` and, where labels move, `AUGMENT_Y`, as a training graph's metadata.

    Args:
        labels: Those of the training graph.

    Raises:
        ConfigError: An augmentation has no meaning for the model's inputs, or would move what its labels describe.
    """
    given = model.graph.inputs[0]
    packed = pieces(model.graph.metadata, INPUTS_KEY)
    parts = packed or (Piece(given.name, tuple(sample_sizes(given))),)
    whole = {p.name for p in parts if given.dtype.kind != "f" or (packed and _is_whole(model.graph, p.name))}
    steps: list[_Step] = []
    for text in features.augment:
        first = steps[-1].first + steps[-1].numbers if steps else 0
        steps.append(_step(text, first, [p for p in parts if p.name not in whole], parts))
    count = steps[-1].first + steps[-1].numbers
    found = {AUGMENT_X: _of_samples(steps, parts, Port(X, given.dtype, ("N", *sample_sizes(given))), count)}
    if (moved := _of_labels([s for s in steps if s.moves], labels, features, count)) is not None:
        found[AUGMENT_Y] = moved
    return {key: base64.b64encode(graph.to_bytes(opset=17)).decode() for key, graph in found.items()}


def _is_whole(graph: Graph, name: str) -> bool:
    """Whether an input that is part of a row of numbers is read as whole numbers."""
    made = graph.producers().get(name)
    return made is not None and made.op == "Cast" and made.attrs["to"] not in (1, 10)


def _step(text: str, first: int, parts: Sequence[Piece], inputs: Sequence[Piece]) -> _Step:
    """One augmentation, with the input that it changes. Raises `ConfigError` unless exactly one is named."""
    asked = Augmentation.parse(text)
    fitting = [p for p in parts if _fits(asked, p.shape) and asked.input in ("", p.name)]
    if len(fitting) != 1:
        raise ConfigError(
            f"recipe: augment {text!r}",
            expected=f"one input of floats {_WANTED[asked.name]}",
            got=some(
                [f"{p.name} {shape_text('n', *p.shape)}{'' if p in parts else ' of whole numbers'}" for p in inputs]
            ),
            hint=f"Name one of them: {asked.name}...@INPUT." if len(fitting) > 1 else "Leave it out.",
        )
    rank = len(fitting[0].shape)
    axis = int(asked.values[1]) - rank if len(asked.values) > 1 and asked.name == "shift" else -1
    axes = (-2, -1) if asked.name in ("crop", "specaugment") else (axis,)
    return _Step(text, asked.name, asked.values, fitting[0], first, axes)


_WANTED = {
    **dict.fromkeys(("flip", "brightness", "contrast"), "[n, colours, height, width]"),
    "crop": "[n, colours, height, width], larger than its padding",
    "noise": "[n, ...]",
    "shift": "[n, ..., steps] with that axis",
    "specaugment": "[n, ..., frequencies, steps], at least as large as its masks",
}


def _fits(asked: Augmentation, shape: tuple[int, ...]) -> bool:
    """Whether an augmentation has a meaning for samples of this shape."""
    rank = len(shape)
    if asked.name == "noise":
        return rank > 0
    if asked.name == "shift":
        axis = int(asked.values[1]) if len(asked.values) > 1 else rank - 1
        return 0 < rank <= 3 and (1 if rank == 3 else 0) <= axis < rank and shape[axis] > 1
    if asked.name == "specaugment":
        return rank in (2, 3) and asked.values[0] <= shape[-2] and asked.values[1] <= shape[-1]
    return rank == 3 and (asked.name != "crop" or asked.values[0] < min(shape[1:]))


def _of_samples(steps: Sequence[_Step], parts: Sequence[Piece], x: Port, count: int) -> Graph:
    """The graph of the samples."""
    g = _begun(x, count)
    values = dict(zip((p.name for p in parts), _split(g, parts), strict=True))
    for (name, moves), group in itertools.groupby(steps, key=lambda s: (s.piece.name, s.moves)):
        some_steps = list(group)
        piece = some_steps[0].piece
        if moves:
            values[name] = _moved(g, values[name], piece.shape, some_steps, g.scalar(0))
        else:
            for step in some_steps:
                values[name] = _WRITERS[step.name](g, values[name], step)
    if len(parts) == 1:
        g.emit("Identity", values[parts[0].name], out=AUGMENTED)
    else:
        rows = [g.emit("Reshape", values[p.name], g.ints(-1, p.size)) for p in parts]
        g.emit("Concat", *rows, attrs={"axis": 1}, out=AUGMENTED)
    return g


def _split(g: Graph, parts: Sequence[Piece]) -> list[str]:
    """The model's inputs of a row of numbers."""
    if len(parts) == 1:
        return [X]
    rows = g.emit_many("Split", X, g.ints(*(p.size for p in parts)), outputs=len(parts), attrs={"axis": 1})
    return [g.emit("Reshape", row, g.ints(-1, *p.shape)) for row, p in zip(rows, parts, strict=True)]


def _begun(values: Port, count: int) -> Graph:
    g = Graph(name="augmentation")
    g.inputs = [values, Port(NUMBERS, np.dtype(np.float32), ("N", count))]
    g.outputs = [Port(AUGMENTED, values.dtype, values.shape)]
    return g


def _of_labels(steps: Sequence[_Step], labels: Port, features: Features, count: int) -> Graph | None:
    """The graph of labels that are places of the input; None where they are of whole samples. Raises `ConfigError` if
    they are neither."""
    shape, kind = tuple(int(d or 0) for d in labels.shape[1:]), labels_of(features.loss)
    of_samples = {"classes": 0, "identities": 0, "own": 0, MULTI: 1, "values": 1}.get(kind)
    if not steps or (len(shape) == of_samples and (kind != "values" or shape == (1,))):
        return None
    text, sample = steps[0].text, steps[0].piece.shape
    places = sample[1:] if len(sample) == 3 else tuple(sample[a] for a in steps[0].axes)
    own = shape[1:] if kind == MULTI else shape
    alike = all(s.piece == steps[0].piece and (len(sample) == 3 or s.axes == steps[0].axes) for s in steps)
    if kind not in JUDGED or own != places or not alike:
        raise ConfigError(
            f"recipe: augment {text!r} with labels {shape_text('n', *shape)} of loss {features.loss!r}",
            expected=f"labels of whole samples, or classes or masks of the places {shape_text(*places)} of one input",
            hint="It moves what these labels describe, and can't move them along: leave it out.",
        )
    empty = next((s.text for s in steps if s.name != "flip"), None)
    if kind != MULTI and features.ignore_label is None and empty is not None:
        raise ConfigError(
            f"recipe: augment {empty!r} with a class for each place, without ignore_label",
            expected="ignore_label, for places that come in from outside",
        )
    g = _begun(Port(Y, labels.dtype, labels.shape), count)
    if len(sample) < 3:
        steps = [replace(s, axes=(-1,)) for s in steps]
    fill = g.scalar(0) if kind == MULTI else g.constant(features.ignore_label or 0, labels.dtype)
    g.emit("Identity", _moved(g, Y, shape, steps, fill), out=AUGMENTED)
    return g


def _moved(g: Graph, value: str, shape: tuple[int, ...], steps: Sequence[_Step], fill: str) -> str:
    """Values [N, *shape], each taken from where the steps put it; `fill` where that is outside.

    Per moved axis the place that every index takes its value from is computed, from the last step to the first.
    """
    rank, taken, inside = len(shape), dict[int, str](), list[str]()
    for step in reversed(steps):
        for number, axis in enumerate(step.axes):
            length, u = shape[axis], _number(g, step.first + number)
            index = taken.get(axis) or g.constant(np.arange(length)[None], np.int32)
            last = g.constant(length - 1, np.int32)
            if step.name == "flip":
                taken[axis] = g.emit("Where", g.emit("Less", u, g.scalar(0.5)), index, g.emit("Sub", last, index))
                continue
            most = int(step.values[0]) if step.name == "crop" else max(1, round(step.values[0] * length))
            offset = g.emit("Sub", _below(g, u, 2 * most + 1), g.scalar(most))
            index = g.emit("Add", index, g.emit("Cast", offset, attrs={"to": _INT32}))
            taken[axis] = g.emit("Min", g.emit("Max", index, g.constant(0, np.int32)), last)
            inside.append(_along(g, g.emit("Equal", taken[axis], index), rank, axis))
    strides = [math.prod(shape[i + 1 :]) for i in range(rank)]
    still = [1 if i - rank in taken else d for i, d in enumerate(shape)]
    place = g.constant(sum(i * s for i, s in zip(np.indices(still), strides, strict=True)), np.int32)
    for axis, index in taken.items():
        place = g.emit("Add", place, g.emit("Mul", _along(g, index, rank, axis), g.constant(strides[axis], np.int32)))
    flat, size = g.emit("Reshape", value, g.ints(0, -1)), g.ints(0, *shape)
    found = g.emit("GatherElements", flat, g.emit("Reshape", place, g.ints(0, -1)), attrs={"axis": 1})
    found = g.emit("Reshape", found, size)
    if not inside:
        return found
    valid = inside[0]
    for other in inside[1:]:
        valid = g.emit("And", valid, other)
    return g.emit("Where", valid, found, fill)


def _along(g: Graph, value: str, rank: int, axis: int) -> str:
    """[N, length], along an axis of samples with this rank."""
    return g.emit("Reshape", value, g.ints(0, *(-1 if i == rank + axis else 1 for i in range(rank))))


def _number(g: Graph, first: int, count: int = 1) -> str:
    """Some of the random numbers [N, count]."""
    return g.emit("Slice", NUMBERS, g.ints(first), g.ints(first + count), g.ints(1))


def _below(g: Graph, u: str, bound: int | str) -> str:
    """A random number from 0 to below 1 as a whole number from 0 to below a bound."""
    return g.emit("Floor", g.emit("Mul", u, g.scalar(bound) if isinstance(bound, int) else bound))


def _mean(g: Graph, value: str, step: _Step) -> str:
    return g.emit("ReduceMean", value, attrs={"axes": list(range(1, len(step.piece.shape) + 1)), "keepdims": 1})


def _factor(g: Graph, step: _Step) -> str:
    """A random number from -SHARE to SHARE for every sample."""
    u = g.emit("Reshape", _number(g, step.first), g.ints(-1, *[1] * len(step.piece.shape)))
    return g.emit("Mul", g.emit("Sub", u, g.scalar(0.5)), g.scalar(2 * step.values[0]))


def _brightness(g: Graph, x: str, step: _Step) -> str:
    """x + a·σ, with the deviation σ of the sample: the same whatever values are normalised by."""
    far = g.emit("Sub", x, _mean(g, x, step))
    deviation = g.emit("Sqrt", _mean(g, g.emit("Mul", far, far), step))
    return g.emit("Add", x, g.emit("Mul", _factor(g, step), deviation))


def _contrast(g: Graph, x: str, step: _Step) -> str:
    """µ + (1 + a)·(x − µ), with the mean µ of the sample."""
    far = g.emit("Sub", x, _mean(g, x, step))
    return g.emit("Add", x, g.emit("Mul", _factor(g, step), far))


def _noise(g: Graph, x: str, step: _Step) -> str:
    """x + DEVIATION · normal numbers, two from two uniform ones (Box and Muller 1958, eq. 1)."""
    half, size = step.numbers // 2, step.piece.size
    first, second = (_number(g, step.first + at, half) for at in (0, half))
    squared = g.emit("Mul", g.emit("Log", g.emit("Sub", g.scalar(1), first)), g.scalar(-2))
    radius = g.emit("Mul", g.emit("Sqrt", squared), g.scalar(step.values[0]))
    angle = g.emit("Mul", second, g.scalar(2 * math.pi))
    both = (g.emit("Mul", radius, g.emit(op, angle)) for op in ("Cos", "Sin"))
    normal = g.emit("Slice", g.emit("Concat", *both, attrs={"axis": 1}), g.ints(0), g.ints(size), g.ints(1))
    return g.emit("Add", x, g.emit("Reshape", normal, g.ints(-1, *step.piece.shape)))


def _specaugment(g: Graph, x: str, step: _Step) -> str:
    """One mask of frequencies and one of steps, each of a limited width, filled with the sample's mean (Park et
    al., "SpecAugment", Interspeech 2019, Sec. 2: masks of width f ~ U[0, F] from f0 ~ U[0, ν − f) on)."""
    shape, masks = step.piece.shape, []
    for number, (axis, most) in enumerate(zip(step.axes, step.values, strict=True)):
        width = _below(g, _number(g, step.first + 2 * number), int(most) + 1)
        begin = _below(g, _number(g, step.first + 2 * number + 1), g.emit("Sub", g.scalar(shape[axis]), width))
        place = g.constant(np.arange(shape[axis])[None], np.float32)
        before, within = g.emit("Less", place, begin), g.emit("Less", place, g.emit("Add", begin, width))
        masks.append(_along(g, g.emit("And", within, g.emit("Not", before)), len(shape), axis))
    return g.emit("Where", g.emit("Or", *masks), _mean(g, x, step), x)


_WRITERS = {"brightness": _brightness, "contrast": _contrast, "noise": _noise, "specaugment": _specaugment}
