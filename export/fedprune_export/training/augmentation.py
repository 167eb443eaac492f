"""Plans a recipe's augmentations: which numbers of a sample they change, and whether labels move along."""

from __future__ import annotations

from collections.abc import Sequence

from fedprune.core.errors import ConfigError, shape_text
from fedprune.core.text import first_few
from fedprune.model.augmentation import AugmentEntry, AugmentPlan, AugmentStep
from fedprune.model.features import JUDGED_LABELS, MULTI_LABELS, Features, labels_of
from fedprune_export.importing.packing import INPUTS_KEY, Piece, read_packing
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.ir.sample_inputs import sample_sizes
from fedprune_export.pruning.model import Model


def augment_plan(model: Model, labels: Port, features: Features) -> AugmentPlan:
    """The augmentations of a training graph's samples, and of its labels where these move along.

    Raises `ConfigError` if an augmentation has no meaning for the model's inputs, or would move what labels describe.
    """
    model_input = model.graph.inputs[0]
    packed = read_packing(model.graph.metadata, INPUTS_KEY)
    # Several inputs travel as one row of floats per sample; token ids among them must not be augmented.
    all_inputs = packed or (Piece(model_input.name, tuple(sample_sizes(model_input))),)
    whole_number_inputs = {
        p.name for p in all_inputs if model_input.dtype.kind != "f" or (packed and _holds_integers(model.graph, p.name))
    }
    steps: list[AugmentStep] = []
    for text in features.augment:
        first = steps[-1].first + steps[-1].random_count if steps else 0
        steps.append(_step(text, first, [p for p in all_inputs if p.name not in whole_number_inputs], all_inputs))
    moving = [(text, step) for text, step in zip(features.augment, steps, strict=True) if step.is_geometric]
    return AugmentPlan(tuple(steps), _fill_label(moving, labels, features))


def _holds_integers(graph: Graph, name: str) -> bool:
    """Whether an input that is part of a row of numbers is read as whole numbers."""
    producer = graph.producers().get(name)
    # TensorProto types: 1 is float, 10 is float16.
    return producer is not None and producer.op == "Cast" and producer.attrs["to"] not in (1, 10)


def _step(text: str, first: int, float_inputs: Sequence[Piece], inputs: Sequence[Piece]) -> AugmentStep:
    """One augmentation, with the input that it changes. Raises `ConfigError` unless exactly one input fits."""
    augmentation = AugmentEntry.parse(text)
    matches = [p for p in float_inputs if _fits(augmentation, p.shape) and augmentation.input in ("", p.name)]
    if len(matches) != 1:
        raise ConfigError(
            f"{text!r}",
            path=("recipe", "augment"),
            expected=f"one input of floats {_INPUT_SHAPES[augmentation.name]}",
            got=first_few(
                [
                    f"{p.name} {shape_text('n', *p.shape)}{'' if p in float_inputs else ' of whole numbers'}"
                    for p in inputs
                ]
            ),
            hint=f"Name one of them: {augmentation.name}...@INPUT." if len(matches) > 1 else "Leave it out.",
        )
    rank = len(matches[0].shape)
    axis = int(augmentation.values[1]) - rank if len(augmentation.values) > 1 and augmentation.name == "shift" else -1
    axes = (-2, -1) if augmentation.name in ("crop", "specaugment") else (axis,)
    begin = sum(p.size for p in inputs[: inputs.index(matches[0])])
    return AugmentStep(augmentation.name, augmentation.values, begin, matches[0].shape, first, axes)


# The shapes that an augmentation takes, for messages; `_fits` decides.
_INPUT_SHAPES = {
    **dict.fromkeys(("flip", "brightness", "contrast"), "[n, colours, height, width]"),
    "crop": "[n, colours, height, width], larger than its padding",
    "noise": "[n, ...]",
    "shift": "[n, ..., steps] with that axis",
    "specaugment": "[n, ..., frequencies, steps], at least as large as its masks",
}


def _fits(augmentation: AugmentEntry, shape: tuple[int, ...]) -> bool:
    """Whether an augmentation has a meaning for samples of this shape."""
    rank = len(shape)
    if augmentation.name == "noise":
        return rank > 0
    if augmentation.name == "shift":
        axis = int(augmentation.values[1]) if len(augmentation.values) > 1 else rank - 1
        return 0 < rank <= 3 and (1 if rank == 3 else 0) <= axis < rank and shape[axis] > 1
    if augmentation.name == "specaugment":
        return rank in (2, 3) and augmentation.values[0] <= shape[-2] and augmentation.values[1] <= shape[-1]
    return rank == 3 and (augmentation.name != "crop" or augmentation.values[0] < min(shape[1:]))


def _fill_label(moving: Sequence[tuple[str, AugmentStep]], labels: Port, features: Features) -> int | None:
    """The label of positions that come in from outside; None where labels are of whole samples, or nothing moves.

    Raises `ConfigError` if labels are neither of samples nor of the positions that move.
    """
    shape, kind = tuple(int(d or 0) for d in labels.shape[1:]), labels_of(features.loss)
    of_samples = {"classes": 0, "own": 0, MULTI_LABELS: 1, "values": 1}.get(kind)
    if not moving or (len(shape) == of_samples and (kind != "values" or shape == (1,))):
        return None
    text, first_step = moving[0]
    positions = (
        first_step.shape[1:] if len(first_step.shape) == 3 else tuple(first_step.shape[a] for a in first_step.axes)
    )
    label_positions = shape[1:] if kind == MULTI_LABELS else shape
    # Labels can follow one input along one set of axes; two that move differently would contradict each other.
    move_alike = all(
        (s.begin, s.shape) == (first_step.begin, first_step.shape) and (len(s.shape) == 3 or s.axes == first_step.axes)
        for _, s in moving
    )
    if kind not in JUDGED_LABELS or label_positions != positions or not move_alike:
        raise ConfigError(
            f"{text!r} with labels {shape_text('n', *shape)} of loss {features.loss!r}",
            path=("recipe", "augment"),
            expected=f"labels of samples, or classes or masks of the positions {shape_text(*positions)} of an input",
            hint="It moves what these labels describe, and can't move them along: leave it out.",
        )
    leaving_gaps = next((text for text, step in moving if step.name != "flip"), None)
    if kind != MULTI_LABELS and features.ignore_label is None and leaving_gaps is not None:
        raise ConfigError(
            f"{leaving_gaps!r} with a class for each place, without ignore_label",
            path=("recipe", "augment"),
            expected="ignore_label, for places that come in from outside",
        )
    return 0 if kind == MULTI_LABELS else features.ignore_label or 0
