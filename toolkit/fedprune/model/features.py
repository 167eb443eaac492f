"""What a training graph can do.

The *features* of a recipe decide which inputs a training graph has, so they name the graph; everything else of a recipe
is a number that is fed at run time and never needs a new graph.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Features:
    """What a training graph can do; `fedprune.model.step_contract` says which inputs and outputs that makes.

    Attributes:
        logit_offset: A vector [classes] added to the logits before the loss (logit adjustment by label prior).
        class_weight: A vector [classes] of loss weights, used as torch does: sum of w·loss over sum of w; with `bce`
            the weight of each class's positive labels.
        class_mask: A vector [classes]: logits of classes with 0 are replaced by 0 before the loss (HeteroFL).
        proximal: Per trained tensor an anchor and a strength µ: adds µ/2 · |w − anchor|² to the loss.
        element_mask: Per trained tensor a 0/1 mask: masked elements are 0 in the forward pass and stay put.
        gradients: The gradients are outputs, too.
        loss: `cross_entropy`, `bce` (with logits, one per label), `mse` or `huber`.
        label_smoothing: A share of every label is spread over all classes (cross-entropy).
        optimizer: `sgd`, `adam` or `adamw`.
        clip: Gradients are scaled down to a global norm.
        accumulate: A batch can be worked through in parts, whose gradients are summed.
        squares: Sums of squared gradients are outputs.
        sample_losses: The loss of every sample is an output.
        ordered_dropout: The graph says in its metadata how channels lie on its tensors' axes.
        axes: So it does, too, where the steps are all as wide as the device, for averages and masks.
        threshold: Per trained tensor a number θ: elements below it in size are 0 in the forward pass, and what is above
            it learns what its size is worth (FIARSE).
        scale: The outputs of every layer with weights, but the last, are multiplied by a number (HeteroFL's scaler).
        mixup: Every sample has a second label, that of the sample that was mixed into it, and a number λ says how much
            the first counts (cross-entropy).
        frozen: Patterns of tensors that stay as they are.
        trainable: Patterns of the only tensors that are trained, if there are any.
    """

    logit_offset: bool = False
    class_weight: bool = False
    class_mask: bool = False
    proximal: bool = False
    element_mask: bool = False
    gradients: bool = False
    loss: str = "cross_entropy"
    label_smoothing: bool = False
    optimizer: str = "sgd"
    clip: bool = False
    accumulate: bool = False
    squares: bool = False
    sample_losses: bool = False
    ordered_dropout: bool = False
    axes: bool = False
    threshold: bool = False
    scale: bool = False
    mixup: bool = False
    frozen: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Short text that names this combination."""
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            parts.append(field.name if value is True else f"{field.name}={_text(value)}")
        return "+".join(parts) or "plain"


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
