"""Features of a recipe: the settings that decide which inputs and outputs a training graph has."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

from fedprune.core import validation
from fedprune.core.metrics import METRICS
from fedprune.model.losses import LOSSES


@dataclass(frozen=True)
class Features:
    """The features of a training graph; `fedprune.model.step_contract` gives the resulting inputs and outputs.

    Attributes:
        logit_offset: A vector [classes] added to the logits before the loss (logit adjustment by label prior).
        class_weight: A vector [classes] of loss weights, used as torch does: sum of w·loss over sum of w; with `bce`
            the weight of each class's positive labels.
        class_mask: A vector [classes]: logits of classes with 0 are replaced by 0 before the loss (HeteroFL).
        proximal: Per trained tensor an anchor and a strength µ: adds µ/2 · |w − anchor|² to the loss.
        drift: Per trained tensor an array that is added to its gradient after clipping.
        decay: Weights decay; only where there is a drift can it be left out, whose time it takes.
        element_mask: Per trained tensor a 0/1 mask: masked elements are 0 in the forward pass and stay put.
        gradients: The gradients are outputs, too.
        loss: One of `LOSSES`; `custom` for the model's own.
        metric: One of `METRICS_OF` these labels, or empty: the graph's metadata has what measures it.
        label_smoothing: A share of every label is spread over all classes (cross-entropy).
        ignore_label: Labels of this class count for nothing (cross-entropy); None for none.
        optimizer: One of `OPTIMIZERS`.
        clip: Gradients are scaled down to a global norm.
        accumulate: A batch can be split into parts, whose gradients are summed.
        ordered_dropout: The graph's metadata has the channels on its tensors' axes.
        axes: So it does, too, where the steps are all as wide as the device, for averages and masks.
        threshold: Per trained tensor a number θ: elements below it in size are 0 in the forward pass, and what is above
            it learns what its size is worth (FIARSE).
        scale: The outputs of every layer with weights, but the last, are multiplied by a number (HeteroFL's scaler).
        label_pairs: Every sample has a second label, that of the sample that was mixed into it, and a number λ says how
            much the first counts (cross-entropy).
        frozen: Patterns of tensors that stay as they are.
        trainable: Patterns of the only tensors that are trained, if there are any.
        augment: The graph's metadata has the graphs of these augmentations.
    """

    logit_offset: bool = False
    class_weight: bool = False
    class_mask: bool = False
    proximal: bool = False
    element_mask: bool = False
    gradients: bool = False
    loss: str = "cross_entropy"
    metric: str = ""
    label_smoothing: bool = False
    ignore_label: int | None = None
    optimizer: str = "sgd"
    clip: bool = False
    accumulate: bool = False
    ordered_dropout: bool = False
    axes: bool = False
    threshold: bool = False
    scale: bool = False
    label_pairs: bool = False
    frozen: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    augment: tuple[str, ...] = ()
    drift: bool = False
    decay: bool = True

    def target_shape(self, outputs: tuple[int, ...]) -> tuple[int, ...]:
        """One sample's labels for outputs of this shape; a model's own loss may take others."""
        return outputs[1:] if self.has_class_labels else outputs

    @property
    def of_task(self) -> Features:
        """The plainest step for the same loss, labels and tensors; for whoever wants its forward pass alone."""
        return Features(loss=self.loss, ignore_label=self.ignore_label, frozen=self.frozen, trainable=self.trainable)

    @property
    def has_class_labels(self) -> bool:
        """Whether labels of a built-in loss are whole numbers."""
        return labels_of(self.loss) == "classes"

    @property
    def counts_hits(self) -> bool:
        """Whether labels are right or wrong, so that hits are counted."""
        return labels_of(self.loss) in JUDGED_LABELS

    @property
    def key(self) -> str:
        """Short text that names this combination."""
        names = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            # As JSON, because a pattern may have a comma or a plus sign.
            text = json.dumps(value) if isinstance(value, tuple) else str(value)
            names.append(field.name if value is True else f"{field.name}={text}")
        return "+".join(names) or "plain"


# The model's own loss, a graph of outputs and labels.
CUSTOM_LOSS = "custom"

# The loss whose labels are a teacher's outputs.
DISTILL_LOSS = "distill"

# Labels of 0 or 1 for every class.
MULTI_LABELS = "multi"

# Kinds of labels about which outputs are right or wrong, so that they have an accuracy.
JUDGED_LABELS = ("classes", MULTI_LABELS)


def labels_of(loss: str) -> str:
    """The labels that a loss compares with. Raises `ConfigError` if there is no such loss."""
    validation.check_word(("recipe", "loss"), loss, tuple(LOSSES))
    return LOSSES[loss].labels


# Metrics besides accuracy and loss, by kind of labels; `custom` for the model's own.
METRICS_OF = {
    kind: (*(name for name, metric in METRICS.items() if kind in metric.labels), CUSTOM_LOSS)
    for kind in dict.fromkeys(loss.labels for loss in LOSSES.values())
}

# Optimisers, with the number of arrays of a tensor's shape that each keeps between steps.
OPTIMIZERS = {"sgd": 1, "adam": 2, "adamw": 2, "lion": 1}

# Those that shrink weights themselves; with the others, weight decay is added to gradients.
DECOUPLED = ("adamw", "lion")
