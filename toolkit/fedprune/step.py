"""The names by which a training graph's inputs and outputs are known.

The exporter writes graphs to this contract and the trainer feeds them by it; neither knows the other.

Inputs: `x` [N, ...], `y` int64 [N], the scalars `lr`, `momentum`, `weight_decay` (float32, shape []), every tensor of
    the architecture under its own name, and for every trainable tensor its momentum buffer. Depending on the recipe's
    features also `logit_offset`, `class_weight`, `class_mask` (float32 [classes]) and, per trainable tensor, anchor,
    µ (shape []) and mask.

Outputs: `loss` (float32 []: the data loss, without the proximal term), `hits` (int64 []: correctly classified samples
    of the batch), for every tensor its next value, for every trainable tensor its next momentum buffer and, on
    demand, its gradient (of the whole objective, without weight decay).
"""

from __future__ import annotations

X = "x"
Y = "y"
LR = "lr"
MOMENTUM = "momentum"
WEIGHT_DECAY = "weight_decay"
LOGIT_OFFSET = "logit_offset"
CLASS_WEIGHT = "class_weight"
CLASS_MASK = "class_mask"
LOSS = "loss"
HITS = "hits"
LOGITS = "logits"
"""The output of an inference graph (its input is `x`)."""

RESERVED = frozenset({X, Y, LR, MOMENTUM, WEIGHT_DECAY, LOGIT_OFFSET, CLASS_WEIGHT, CLASS_MASK, LOSS, HITS, LOGITS})
"""Names that no tensor of a model may have; the importer renames such tensors."""


def buffer(name: str) -> str:
    """Momentum buffer of a tensor (input)."""
    return f"{name}::momentum"


def anchor(name: str) -> str:
    """What the proximal term pulls a tensor towards (input)."""
    return f"{name}::anchor"


def strength(name: str) -> str:
    """Proximal strength µ of a tensor (input)."""
    return f"{name}::mu"


def mask(name: str) -> str:
    """Element mask of a tensor (input)."""
    return f"{name}::mask"


def following(name: str) -> str:
    """The next value of a tensor or momentum buffer (output)."""
    return f"{name}::next"


def gradient(name: str) -> str:
    """Gradient of a tensor (output)."""
    return f"{name}::gradient"
