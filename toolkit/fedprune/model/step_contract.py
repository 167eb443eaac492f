"""The contract of training graphs: the name, type and shape of each input and output.

The exporter writes graphs by this contract and the trainer feeds them by it; neither knows the other. A graph has the
inputs and outputs that its recipe's features need, and no others. N is the number of samples, K the
number of a sample's outputs, such as classes; if a sample has several places, such as pixels, of each place.

Inputs:
    `x` [N, ...]: float32, or the whole numbers that the model takes: int64 token ids, uint8 pixels and so on.
    `y`: the labels, for outputs [N, K, ...]. Their form depends on the loss:
        `cross_entropy`: int64 [N, ...], classes;
        `bce`: float32 of the outputs' shape, from 0 to 1;
        `distill`: float32 of the outputs' shape, a teacher's outputs;
        `custom`: the form that the model's own loss takes;
        other losses: float32 of the outputs' shape.
    `y_partner` (with pairs of labels): int64 [N, ...], those of the sample that was mixed into each: `y` in another
        order; `y_share` (shape []): λ, how much `y` counts next to it. Where nothing is mixed, `y_partner` is `y` and λ
        is 1.
    Scalars (shape []): `lr`, `weight_decay` (with `drift`, SGD and Adam only if it isn't 0); with SGD `momentum`; with
        Adam, AdamW and Lion `beta1` and `beta2` (float64); with Adam and AdamW `epsilon` and `step_number` (int64,
        counting optimiser steps from 1); `label_smoothing`, `huber_delta`, `distill_temperature`, `clip_norm` as asked
        for. float32 where nothing else is said.
    `divisor` (with accumulation): what the sum of the losses is divided by, for the whole batch of which `x` is a part:
        its number of samples; in cross-entropy of labels that count or, with class weights, the sum of their weights.
    `output_scale` (with a scaler, shape []): outputs of every layer with weights, but the last, are multiplied by it.
    `logit_offset`, `class_weight`, `class_mask`: float32 [K]; with `bce` the class weight is torch's `pos_weight`.
    Every tensor of the architecture under its own name, and per *trained* tensor (trainable and not frozen) the
        optimiser's state: one array with SGD and Lion (momentum), two with Adam and AdamW (mean and mean square of
        gradients).
    Per dropout of the model a mask (`keep`): 0 where a number is dropped, 1 / (1 − ratio) elsewhere; its size is 1
        along axes on which numbers are dropped together. Per draw of random numbers in the model the numbers
        (`noise`). Both: `fedprune.model.random_inputs`.
    On demand, per trained tensor: anchor and µ (shape []), mask (0 or 1), `threshold_name` θ (shape [], 0 for none),
        the gradients so far of this batch (`sum`), the linear term (`drift`).

Outputs:
    `loss` (float32 []): the data loss, without the proximal term. With accumulation it is this part's share: shares
        add up to the batch's loss.
    `hits` (int64 []): with cross-entropy, labels whose logit is the largest of its place (of a pair, the label that
        counts more); with `bce`, entries of [N, K, ...] whose logit is on the label's side of 0 (labels above 0.5 count
        as 1). With `mse` and `huber` there is none.
    Per trained tensor its next value and its next state; per statistic that isn't frozen its next value. A frozen
        tensor has no output, because it stays as it is.
    On demand: per trained tensor `gradient_name` (of the whole objective and, with accumulation, of the batch so far;
        without weight decay, before clipping), the next `sum`.

All state is zero at the beginning of a round, and `step_number` begins at 1, unless the recipe keeps the optimiser's
state: then both continue from the round before. With accumulation only the last part's
next values and next states are a step; of the parts before it only the sums, the statistics, `loss` and `hits` are
taken, and `sum` is zero for the first part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from fedprune.model.features import OPTIMIZERS, Features
from fedprune.model.loss import CLASS_WEIGHT as CLASS_WEIGHT
from fedprune.model.loss import HITS as HITS
from fedprune.model.loss import LABEL_SMOOTHING as LABEL_SMOOTHING
from fedprune.model.loss import Y_PARTNER as Y_PARTNER
from fedprune.model.loss import Y_SHARE as Y_SHARE
from fedprune.model.loss import Y as Y
from fedprune.model.losses import LOSSES

X = "x"
LR = "lr"
MOMENTUM = "momentum"
WEIGHT_DECAY = "weight_decay"
BETA1 = "beta1"
BETA2 = "beta2"
EPSILON = "epsilon"
STEP_NUMBER = "step_number"
# Numbers that single losses read, named as in recipes.
LOSS_SETTINGS = frozenset(loss.setting for loss in LOSSES.values() if loss.setting)
CLIP_NORM = "clip_norm"
DIVISOR = "divisor"
LOGIT_OFFSET = "logit_offset"
CLASS_MASK = "class_mask"
OUTPUT_SCALE = "output_scale"
LOSS = "loss"
# The output of an inference graph (its input is `x`), and the value in a training graph from which the loss is
# computed.
LOGITS = "logits"

# Inputs with an entry for every sample.
SAMPLE_INPUTS = frozenset({X, Y, Y_PARTNER})


@dataclass(frozen=True)
class Number:
    """A number that training graphs of some features read (shape []): the value of a setting of the recipe, or one that
    differs from step to step if `setting` is empty."""

    setting: str
    is_read: Callable[[Features], bool] = lambda _: True
    dtype: type[np.generic] = np.float32


def _is_adam(features: Features) -> bool:
    return features.optimizer in ("adam", "adamw")


def _is_read_by_loss(setting: str, features: Features) -> bool:
    return LOSSES[features.loss].setting == setting


# In the order in which graphs have them.
OPTIMIZER_NUMBERS = {
    LR: Number("lr"),
    MOMENTUM: Number("momentum", lambda f: f.optimizer == "sgd"),
    WEIGHT_DECAY: Number("weight_decay", lambda f: f.decay),
    BETA1: Number("beta1", lambda f: f.optimizer != "sgd", np.float64),
    BETA2: Number("beta2", lambda f: f.optimizer != "sgd", np.float64),
    EPSILON: Number("epsilon", _is_adam),
    STEP_NUMBER: Number("", _is_adam, np.int64),
    CLIP_NORM: Number("clip_norm", lambda f: f.clip),
}

NUMBERS = OPTIMIZER_NUMBERS | {
    OUTPUT_SCALE: Number("scale", lambda f: f.scale),
    LABEL_SMOOTHING: Number("label_smoothing", lambda f: f.label_smoothing),
    **{name: Number(name, partial(_is_read_by_loss, name)) for name in LOSS_SETTINGS},
}

# Inputs that belong to no tensor.
INPUTS = frozenset({X, Y, Y_PARTNER, Y_SHARE, *NUMBERS, DIVISOR, LOGIT_OFFSET, CLASS_WEIGHT, CLASS_MASK})

# Names that no tensor of a model may have; the importer renames such tensors.
RESERVED_NAMES = INPUTS | {LOSS, HITS, LOGITS}

# Keys of a training graph's metadata, all but that of random inputs on demand.
IGNORED_METADATA = "fedprune.ignored"  # the class of labels that count for nothing
METRIC_METADATA = "fedprune.metric"  # a metric: an ONNX file in base64
AUGMENT_METADATA = "fedprune.augment"  # how samples, and labels of positions, are augmented (`AugmentPlan` as JSON)
RANDOM_METADATA = "fedprune.dropout"  # how each random input is drawn, by its name, as JSON
AXES_METADATA = "fedprune.axes"  # the channels on its tensors' axes
UNREACHED_METADATA = "fedprune.unreached"  # what keeps gradients from tensors that train, by their names, as JSON

# Outputs of a metric, whose inputs are `logits` and `y`: sums [k] (float32), which add up over the parts of a set, and
# its value (float32 []), which is computed from only these sums.
SUMS, VALUE = "sums", "value"


# Names of the arrays that belong to a tensor, from the tensor's name: inputs, outputs and, last, arrays of updates.


def momentum_name(name: str) -> str:
    """A tensor's momentum, with Adam and Lion its mean of gradients."""
    return f"{name}::momentum"


def second_moment_name(name: str) -> str:
    """Adam's mean of squared gradients."""
    return f"{name}::second"


def anchor_name(name: str) -> str:
    """The proximal term's anchor."""
    return f"{name}::anchor"


def strength_name(name: str) -> str:
    """The proximal term's strength µ."""
    return f"{name}::mu"


def mask_name(name: str) -> str:
    """A tensor's element mask."""
    return f"{name}::mask"


def drift_name(name: str) -> str:
    """What is added to a tensor's gradient after clipping, in every step of a round."""
    return f"{name}::drift"


def threshold_name(name: str) -> str:
    """The magnitude θ below which its elements count as 0."""
    return f"{name}::threshold"


def gradient_sum_name(name: str) -> str:
    """A tensor's gradients, summed over the parts of this batch so far."""
    return f"{name}::sum"


def base_name(name: str) -> str:
    """A frozen tensor in the precision in which it is stored."""
    return f"{name}::base"


def base_scale_name(name: str) -> str:
    """Scales of a frozen tensor that is stored as int8, one per output channel."""
    return f"{name}::scale"


def dropout_mask_name(name: str) -> str:
    """The mask of a dropout."""
    return f"{name}::keep"


def noise_name(name: str) -> str:
    """The numbers of a draw in the model."""
    return f"{name}::noise"


def next_name(name: str) -> str:
    """The next value of a tensor, or of an array that belongs to one (output)."""
    return f"{name}::next"


def gradient_name(name: str) -> str:
    """The gradient of a tensor (output)."""
    return f"{name}::gradient"


def squares_name(name: str) -> str:
    """The squared gradients of a tensor in an update."""
    return f"{name}::squares"


def is_random_input(name: str) -> bool:
    return name.endswith((dropout_mask_name(""), noise_name("")))


def state_names(optimizer: str) -> tuple[Callable[[str], str], ...]:
    """The optimiser state per trained tensor: functions from its name to the arrays' names."""
    return (momentum_name, second_moment_name)[: OPTIMIZERS[optimizer]]
