"""What a recipe's augmentations change in a model's samples, and whether labels move along: checked at an export."""

from __future__ import annotations

from collections.abc import Sequence

from fedprune.core.errors import ConfigError, shape_text
from fedprune.core.text import some
from fedprune.model.augmentation import Augmentation, AugmentPlan, AugmentStep
from fedprune.model.recipe import JUDGED, MULTI, Features, labels_of
from fedprune_export.importing.packing import INPUTS_KEY, Piece, pieces
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.ir.trace import sample_sizes
from fedprune_export.pruning.model import Model


def augment_plan(model: Model, labels: Port, features: Features) -> AugmentPlan:
    """The augmentations of a training graph's samples, and of its labels where these move along.

    Args:
        labels: Those of the training graph.

    Raises:
        ConfigError: An augmentation has no meaning for the model's inputs, or would move what its labels describe.
    """
    given = model.graph.inputs[0]
    packed = pieces(model.graph.metadata, INPUTS_KEY)
    parts = packed or (Piece(given.name, tuple(sample_sizes(given))),)
    whole = {p.name for p in parts if given.dtype.kind != "f" or (packed and _is_whole(model.graph, p.name))}
    steps: list[AugmentStep] = []
    for text in features.augment:
        first = steps[-1].first + steps[-1].numbers if steps else 0
        steps.append(_step(text, first, [p for p in parts if p.name not in whole], parts))
    moving = [(text, step) for text, step in zip(features.augment, steps, strict=True) if step.moves]
    return AugmentPlan(tuple(steps), _fill_of_labels(moving, labels, features))


def _is_whole(graph: Graph, name: str) -> bool:
    """Whether an input that is part of a row of numbers is read as whole numbers."""
    made = graph.producers().get(name)
    return made is not None and made.op == "Cast" and made.attrs["to"] not in (1, 10)


def _step(text: str, first: int, parts: Sequence[Piece], inputs: Sequence[Piece]) -> AugmentStep:
    """One augmentation, with the input that it changes. Raises `ConfigError` unless exactly one is named."""
    asked = Augmentation.parse(text)
    fitting = [p for p in parts if _fits(asked, p.shape) and asked.input in ("", p.name)]
    if len(fitting) != 1:
        raise ConfigError(
            f"{text!r}",
            path=("recipe", "augment"),
            expected=f"one input of floats {_WANTED[asked.name]}",
            got=some(
                [f"{p.name} {shape_text('n', *p.shape)}{'' if p in parts else ' of whole numbers'}" for p in inputs]
            ),
            hint=f"Name one of them: {asked.name}...@INPUT." if len(fitting) > 1 else "Leave it out.",
        )
    rank = len(fitting[0].shape)
    axis = int(asked.values[1]) - rank if len(asked.values) > 1 and asked.name == "shift" else -1
    axes = (-2, -1) if asked.name in ("crop", "specaugment") else (axis,)
    begin = sum(p.size for p in inputs[: inputs.index(fitting[0])])
    return AugmentStep(asked.name, asked.values, begin, fitting[0].shape, first, axes)


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


def _fill_of_labels(moving: Sequence[tuple[str, AugmentStep]], labels: Port, features: Features) -> int | None:
    """The label of places that come in from outside; None where labels are of whole samples, or nothing moves. Raises
    `ConfigError` if labels are neither of samples nor of the places that move."""
    shape, kind = tuple(int(d or 0) for d in labels.shape[1:]), labels_of(features.loss)
    of_samples = {"classes": 0, "own": 0, MULTI: 1, "values": 1}.get(kind)
    if not moving or (len(shape) == of_samples and (kind != "values" or shape == (1,))):
        return None
    text, one = moving[0]
    places = one.shape[1:] if len(one.shape) == 3 else tuple(one.shape[a] for a in one.axes)
    own = shape[1:] if kind == MULTI else shape
    alike = all(
        (s.begin, s.shape) == (one.begin, one.shape) and (len(s.shape) == 3 or s.axes == one.axes) for _, s in moving
    )
    if kind not in JUDGED or own != places or not alike:
        raise ConfigError(
            f"{text!r} with labels {shape_text('n', *shape)} of loss {features.loss!r}",
            path=("recipe", "augment"),
            expected=f"labels of whole samples, or classes or masks of the places {shape_text(*places)} of one input",
            hint="It moves what these labels describe, and can't move them along: leave it out.",
        )
    empty = next((text for text, step in moving if step.name != "flip"), None)
    if kind != MULTI and features.ignore_label is None and empty is not None:
        raise ConfigError(
            f"{empty!r} with a class for each place, without ignore_label",
            path=("recipe", "augment"),
            expected="ignore_label, for places that come in from outside",
        )
    return 0 if kind == MULTI else features.ignore_label or 0
