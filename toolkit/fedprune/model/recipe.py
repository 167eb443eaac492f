"""Recipes: the settings of local training in one round.

The *features* of a recipe decide which inputs a training graph has, so they identify the graph. Everything else is a
number that is fed at run time and never needs a new graph.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ConfigError, value_text
from fedprune.core.metrics import ACCURACY, LOSS, METRICS, SCORE
from fedprune.core.settings import bounded, check_fields, choice_of
from fedprune.core.validation import is_number
from fedprune.model import augmentation, mixup, scaling
from fedprune.model.features import CUSTOM_LOSS, DECOUPLED, JUDGED_LABELS, METRICS_OF, OPTIMIZERS, Features, labels_of
from fedprune.model.losses import LOSSES
from fedprune.model.rule import SettingRule, check_rules

# Schedules of the learning rate over a job's rounds.
SCHEDULES = ("constant", "cosine")

MASKS = ("none", "hard", "threshold")

_MAX_ENTRIES = 1000
# Entries of a list of patterns or densities, and letters of a pattern.
_MAX_PATTERN_LENGTH = 1000

# Checked settings by the given ones, because every round repeats the recipes of the round before.
_CHECKED_SETTINGS: dict[tuple[object, ...], dict[str, Any]] = {}
_MAX_CHECKED_SETTINGS = 256


@dataclass(frozen=True)
class PlainTraining:
    """The settings that FedAvg's local training has, too: steps, loss, optimiser, what is trained, and privacy.

    Attributes:
        epochs: Passes over the local data.
        batch_size: Samples per step; the last batch of an epoch may be smaller.
        lr: Learning rate, from 0; with 0 no weight moves, but batch-norm statistics do (schedules may end there).
        momentum: Momentum of SGD, below 1.
        weight_decay: Added to gradients as weight_decay · w; with AdamW and Lion it shrinks the weights by
            lr · weight_decay.
        max_steps: Upper limit of steps, 0 for none.
        loss: `cross_entropy` (one class per sample, or per place of it), `bce` (labels 0 or 1 of every class, from
            logits), `mse`, `l1` or `huber` (numbers to predict), `distill` (Hinton et al. 2015: labels are a teacher's
            outputs), or `custom`: the model's own.
        metric: By what models are judged in addition to loss and accuracy: of classes `miou` (mean over classes of the
            overlap of places with them and guessed ones, over their union) or `perplexity`; of labels 0 or 1 `ap`
            (average precision, the mean over classes, by 200 bins of the sigmoid); of values `rmse` or `mae`;
            `custom`: the model's own, which is reported as its score. Empty for none.
        label_smoothing: Share of every label that is spread over all classes (cross-entropy).
        ignore_label: Labels of this class count for nothing (cross-entropy), such as unlabelled pixels.
        huber_delta: From this error on the Huber loss grows linearly.
        optimizer: `sgd`, `adam` or `adamw`, as in torch.optim, or `lion` (Chen et al. 2023, Alg. 2), which needs as
            little memory as SGD; state starts at zero every round, unless `keep_optimizer_state` is set.
        beta1: Adam's share of the old mean of gradients that is kept; Lion's in what its sign is taken of.
        beta2: Adam's share of the old mean of squared gradients that is kept; Lion's of its mean of gradients, for
            which its authors take 0.99.
        epsilon: Adam's addend of the denominator.
        clip_norm: Gradients of all tensors together are scaled down to this norm; 0 leaves them.
        accumulate: Parts in which a batch is worked through, one after the other: the memory of one part, the gradient
            of the whole. (Batch norm takes the statistics of each part.)
        frozen: Patterns of tensors (such as `layer1.*`) that are not trained and come back as they were. A batch norm
            whose statistics are frozen normalises by them.
        trainable: Patterns of the only tensors that are trained; empty for all but those that the model itself froze.
        best_epoch: With `patience` the weights of the epoch with the lowest validation loss count; if not, those that
            training ended with.
        evaluate_every: The board measures its models (offered, trained, averaged) on its own test and validation
            samples in one of this many rounds; in the others it trains and serves without, which costs it less.
        distill_temperature: What outputs of model and teacher are divided by in the loss `distill`.
        keep_optimizer_state: The board keeps the optimiser's state (momentum, means, the number of steps) between
            rounds; it stays on the board. Channels that are new in its submodel begin without.
        lr_warmup: Rounds, or a part of one, in which the learning rate grows from 0 to `lr`, step by step.
        lr_schedule: `constant`; or `cosine`: from then on the rate falls along half a cosine (Loshchilov and Hutter
            2017, eq. 5, without restarts), step by step, to 0 at the end of round `lr_rounds`.
        lr_rounds: Rounds of `cosine`; 0 for all of the job's, or for one where there is no job.
        augment: Random augmentations of training samples, in this order: `flip` (left and right, every other time),
            `crop:PIXELS` (after padding with zeros), `brightness:SHARE`, `contrast:SHARE`, `noise:DEVIATION`,
            `shift:SHARE` (in time) or `specaugment:FREQUENCIES:STEPS` (Park et al. 2019). Classes of pixels and masks
            move along; other labels with places are refused.
        update_clip: The most that the whole update may be long (`fedprune.updates.clipped_noise`); 0 leaves it as
            it is. Above 0, batch-norm statistics aren't uploaded, nor anything that was measured on samples.
        update_noise: Standard deviation of the noise that is added to every element of the update.
        secure_aggregation: The update leaves the board masked, and never otherwise.
        scaling: What samples of numbers are scaled by: `COLUMN:MEAN:DEVIATION` for each column of a table (or each
            channel of arrays, in their order), or `board` alone for each board's own mean and deviation. Predictions of
            columns are scaled back. Empty for numbers as they are.
    """

    epochs: int = bounded(1, 1, 10_000)
    batch_size: int = bounded(32, 1, 65_536)
    lr: float = bounded(0.05, 0, 1_000)
    momentum: float = bounded(0.9, 0, 1, below=True)
    weight_decay: float = bounded(0.0, 0, 1_000)
    max_steps: int = bounded(0, 0, 10**9)
    loss: str = choice_of("cross_entropy", tuple(LOSSES))
    label_smoothing: float = bounded(0.0, 0, 1)
    huber_delta: float = bounded(1.0, 1e-6, 1e6)
    optimizer: str = choice_of("sgd", OPTIMIZERS)
    beta1: float = bounded(0.9, 0, 1, below=True)
    beta2: float = bounded(0.999, 0, 1, below=True)
    epsilon: float = bounded(1e-8, 1e-16, 1)
    clip_norm: float = bounded(0.0, 0, 1e6)
    accumulate: int = bounded(1, 1, 65_536)
    frozen: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    evaluate_every: int = bounded(1, 1, 10**6)
    best_epoch: bool = True
    ignore_label: int | None = bounded(None, -(2**31), 2**31 - 1)
    metric: str = ""
    distill_temperature: float = bounded(2.0, 0.01, 1_000)
    keep_optimizer_state: bool = False
    lr_warmup: float = bounded(0.0, 0, 10**6)
    lr_schedule: str = choice_of("constant", SCHEDULES)
    lr_rounds: int = bounded(0, 0, 10**6)
    augment: tuple[str, ...] = ()
    update_clip: float = bounded(0.0, 0, 1e6)
    update_noise: float = bounded(0.0, 0, 1e10)
    secure_aggregation: bool = False
    scaling: tuple[str, ...] = ()


@dataclass(frozen=True)
class LocalMethod(mixup.Mixup):
    """What a strategy adds to plain local training; FedAvg has none of it.

    Attributes:
        proximal: Strength µ of the pull towards the weights that were received; 0 leaves it out.
        logit_adjustment: Add the log of the device's own (smoothed) label shares to the logits in the loss and in
            personal predictions: log((n_c + 0.1) / (n + 0.1·C)).
        mask_absent_classes: Take classes that the device has no sample of out of the loss (HeteroFL's masked loss).
        balance_classes: Weigh classes by the inverse of their local share; with `bce`, each class's positive labels by
            its negatives over its positives.
        ordered_dropout: Densities: every step trains the model at one of these, or at the device's own width (FjORD);
            empty for the device's own width in every step.
        average: Share of the old average that the board's own moving average of trained weights keeps every round; it
            is what serves, and its accuracy is reported. 0 for none: the last weights serve.
        blend: Share of the received weights in the model that serves where the board keeps an average: it is
            (1 − blend) · average + blend · received, but for tensors that are personal or frozen. The average that
            is kept has none of it.
        validate_blend: With `blend` the board compares its average with and without the received weights, and these
            without its labels' shares, on its validation samples, and serves another one where it is clearly better.
        calibrate: After training, one pass over the local training samples measures batch-norm statistics again, for
            what is evaluated, serves and is sent.
        personal: Patterns of tensors that stay on the board: they are not part of its updates, and its own last ones
            take the place of those received.
        scale: The outputs of every layer with weights, but the last, are multiplied by this in training alone
            (HeteroFL's scaler: 1 / the device's share of channels).
        mask: `none`; `hard`: elements that the offer's mask leaves out are 0 and stay so; `threshold`: so are, step by
            step, those of masked tensors that are smaller than `mask_threshold` (FIARSE).
        mask_threshold: FIARSE's θ.
        patience: Training ends when the loss of the device's validation samples hasn't fallen below its lowest for so
            many epochs; 0 trains all epochs.
        report_squares: The update has the squared gradients of the last step, too, as tensors `name::squares`.
        drift: Steps add the offer's drift, a tensor per trained one, to gradients after clipping; where it has none, 0.
    """

    proximal: float = bounded(0.0, 0, 1e6)
    logit_adjustment: bool = False
    mask_absent_classes: bool = False
    balance_classes: bool = False
    ordered_dropout: tuple[float, ...] = ()
    average: float = bounded(0.0, 0, 1, below=True)
    blend: float = bounded(0.0, 0, 1)
    validate_blend: bool = False
    calibrate: bool = False
    personal: tuple[str, ...] = ()
    scale: float = bounded(1.0, 1e-3, 1e3)
    mask: str = choice_of("none", MASKS)
    mask_threshold: float = bounded(0.0, 0, 1e6)
    patience: int = bounded(0, 0, 10_000)
    report_squares: bool = False
    drift: bool = False


@dataclass(frozen=True)
class Recipe(LocalMethod, PlainTraining):
    """Local training of one round."""

    def __post_init__(self) -> None:
        # With types: 1 and numpy's 1 may have the same text, and True equals 1.
        settings_key = repr(vars(self)), *map(type, vars(self).values())
        checked = _CHECKED_SETTINGS.get(settings_key)  # one look-up, since another thread may clear them in between
        if checked is None:
            self._check()
            if len(_CHECKED_SETTINGS) >= _MAX_CHECKED_SETTINGS:
                _CHECKED_SETTINGS.clear()
            checked = _CHECKED_SETTINGS[settings_key] = dict(vars(self))
        vars(self).update(checked)

    def _check(self) -> None:
        check_fields(self, ("recipe",))
        if self.metric != "":
            validation.check_word(("recipe", "metric"), self.metric, METRICS_OF[labels_of(self.loss)])
        kind = "patterns of tensor names, such as ['layer1.*']"
        for name in ("frozen", "trainable", "personal"):
            value = getattr(self, name)
            patterns = _entries(name, value, kind, lambda p: isinstance(p, str) and 0 < len(p) <= _MAX_PATTERN_LENGTH)
            object.__setattr__(self, name, patterns)
        dropout, expected = self.ordered_dropout, "densities above 0 and up to 1"
        dropout = _entries("ordered_dropout", dropout, expected, lambda share: is_number(share, 0, 1) and share > 0)
        object.__setattr__(self, "ordered_dropout", tuple(map(float, dropout)))
        object.__setattr__(self, "augment", augmentation.check_augmentations(self.augment))
        object.__setattr__(self, "scaling", scaling.check_scaling(self.scaling))
        check_rules(self, RULES, ("recipe",))

    def learning_rate(self, round_: int, done_share: float) -> float:
        """The learning rate at a point of a job: `done_share`, a share from 0 to 1, of round `round_`, from 1. A step
        takes that of its middle, so that neither the first one nor the last one is lost."""
        elapsed, rounds = round_ - 1 + done_share, max(1, self.lr_rounds)
        if elapsed < self.lr_warmup:
            return self.lr * elapsed / self.lr_warmup
        if self.lr_schedule == "constant":
            return self.lr
        decayed_share = (elapsed - self.lr_warmup) / (rounds - self.lr_warmup) if elapsed < rounds else 1.0
        return self.lr * (1 + math.cos(math.pi * decayed_share)) / 2

    @property
    def can_mix(self) -> bool:
        """Whether labels of this task can be mixed: those that all count, and are classes or values."""
        return LOSSES[self.loss].can_mix and self.ignore_label is None

    @property
    def plain_training(self) -> Recipe:
        """The same training without the settings that strategies add."""
        return replace(self, **vars(LocalMethod()))

    @property
    def judged_by(self) -> str:
        """The name of the metric (`fedprune.core.metrics`) by which models are judged."""
        return judged_by({"loss": self.loss, "metric": self.metric})

    @cached_property
    def features(self) -> Features:
        """The training graph that this recipe needs."""
        return Features(
            logit_offset=self.logit_adjustment,
            class_weight=self.balance_classes,
            class_mask=self.mask_absent_classes,
            proximal=self.proximal > 0,
            loss=self.loss,
            metric=self.metric,
            label_smoothing=self.label_smoothing > 0,
            ignore_label=self.ignore_label,
            optimizer=self.optimizer,
            clip=self.clip_norm > 0,
            accumulate=self.accumulate > 1,
            ordered_dropout=bool(self.ordered_dropout),
            axes=self.average > 0 or self.mask != "none",
            element_mask=self.mask == "hard",
            threshold=self.mask == "threshold",
            scale=self.scale != 1,
            label_pairs=self.mixes_samples and labels_of(self.loss) == "classes",
            gradients=self.report_squares,
            frozen=self.frozen,
            trainable=self.trainable,
            augment=self.augment,
            drift=self.drift,
            decay=self.weight_decay > 0 or not self.drift or self.optimizer in DECOUPLED,
        )

    @property
    def extra_files(self) -> int:
        """Files of a model's size that a board stores in addition to those of every round, at the peak. These are the
        drift, a served model that differs from the update, and three records of the board's average, personal tensors
        and optimiser's state: the newest, the one that it was made from, and the staged one."""
        differs = self.calibrate or self.mask != "none" or self.report_squares or self.update_clip > 0
        differs = differs or self.secure_aggregation
        serves = differs or self.average > 0 or bool(self.personal)
        records = (self.average > 0) + bool(self.personal) + self._kept_states
        return int(serves) + 3 * records + self.report_squares + self.drift

    @property
    def extra_copies(self) -> int:
        """Copies of all weights that a board holds in memory besides those of training. Those are the average as it was
        and as it is, the received weights that are blended into what serves, the best epoch's weights, and the
        optimiser's state as it was."""
        best_epoch_copy = self.patience > 0 and self.best_epoch
        return 2 * (self.average > 0) + (self.blend > 0) + best_epoch_copy + self._kept_states

    @property
    def _kept_states(self) -> int:
        """Arrays per trained tensor that the optimiser leaves to the next round."""
        return OPTIMIZERS[self.optimizer] if self.keep_optimizer_state else 0

    @property
    def micro_batch(self) -> int:
        """The maximum number of samples that are in memory at once."""
        return -(-self.batch_size // self.accumulate)

    def micro_batch_sizes(self, samples: int) -> list[int]:
        """The sizes of a full batch's micro-batches, largest first, which differ by one at most. Fewer local samples
        make a smaller batch."""
        batch = min(self.batch_size, samples)
        count = -(-batch // self.micro_batch)
        smallest, larger_count = divmod(batch, count)
        return [smallest + 1] * larger_count + [smallest] * (count - larger_count)

    def with_micro_batches(self, accumulate: int) -> Recipe:
        """The recipe with at least this many micro-batches, as far as a batch has that many samples."""
        count = min(max(self.accumulate, accumulate), self.batch_size)
        return self if count == self.accumulate else replace(self, accumulate=count)

    def steps(self, samples: int) -> int:
        """Optimiser steps for this many local samples."""
        steps = self.epochs * -(-samples // self.batch_size)
        return min(steps, self.max_steps) if self.max_steps else steps

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def to_offer(self) -> dict[str, Any]:
        """As plain JSON types, without settings that have their default: most do, and every offer carries a recipe.
        Boards must therefore have the same defaults, which are part of the protocol."""
        defaults = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in self.to_dict().items() if getattr(self, k) != defaults[k]}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Recipe:
        """Read and check; missing settings have their default. Raises `ConfigError` for an unknown key, a wrong type or
        a number out of range."""
        return cls(**validation.check_table(cls, body, ("recipe",)))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))


def _loss_rule(setting: str) -> SettingRule:
    """The rule of a setting that only some losses support."""
    losses = [name for name, loss in LOSSES.items() if setting in loss.terms]
    return SettingRule(setting, "loss", lambda r: r.loss in losses, f"loss {' or '.join(losses)}")


_REVEALS_HINT = "A board would tell {}, which no noise covers."

# Settings that exclude each other, or mean nothing without another one.
RULES = (
    *map(_loss_rule, sorted(frozenset().union(*(loss.terms for loss in LOSSES.values())))),
    *mixup.RULES,
    SettingRule("lr_rounds", "lr_schedule", lambda r: r.lr_schedule != "constant", "lr_schedule 'cosine'"),
    SettingRule(
        "lr_warmup", "lr_rounds", lambda r: not r.lr_rounds or r.lr_warmup < r.lr_rounds, "fewer rounds than that"
    ),
    SettingRule("accumulate", "batch_size", lambda r: r.accumulate <= r.batch_size, "at most batch_size parts"),
    SettingRule("mask_threshold", "mask", lambda r: r.mask == "threshold", "mask 'threshold'"),
    SettingRule(
        "blend", "average", lambda r: r.average > 0, "average above 0", "Received weights are blended into it."
    ),
    SettingRule("validate_blend", "blend", lambda r: r.blend > 0, "blend above 0"),
    SettingRule("update_noise", "update_clip", lambda r: r.update_clip > 0, "update_clip above 0"),
    SettingRule(
        "report_squares", "update_clip", lambda r: not r.update_clip, "none", _REVEALS_HINT.format("squared gradients")
    ),
    SettingRule(
        "patience", "update_clip", lambda r: not r.update_clip, "none", _REVEALS_HINT.format("when its loss was lowest")
    ),
    SettingRule(
        "ordered_dropout",
        "mask",
        lambda r: r.mask == "none",
        "one of the two",
        "A narrower step of a masked model is a model that nothing has chosen.",
    ),
)


def judged_by(recipe: Mapping[str, Any]) -> str:
    """The name of the metric by which a recipe's models are judged; missing settings have their default."""
    metric = recipe.get("metric", Recipe.metric)
    if metric:
        return SCORE if metric == CUSTOM_LOSS else str(metric)
    return (ACCURACY if labels_of(recipe.get("loss", Recipe.loss)) in JUDGED_LABELS else LOSS).name


def judging_metric(job: Mapping[str, Any]) -> str:
    """The name of the metric by which a stored job's models are judged; empty if this version doesn't know it."""
    try:
        name = judged_by(job.get("recipe", {}))
    except ConfigError:
        return ""
    return name if name in METRICS else ""


LIST_SETTINGS = tuple(field.name for field in fields(Recipe) if str(field.type).startswith("tuple["))


def _entries(name: str, value: object, kind: str, fits: Callable[[Any], bool]) -> tuple[Any, ...]:
    """A setting that is a list. Raises `ConfigError` for anything else, or an entry that doesn't fit."""
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or len(value) > _MAX_ENTRIES
        or not all(fits(entry) for entry in value)
    ):
        raise ConfigError(("recipe", name), expected=f"a list of up to {_MAX_ENTRIES} {kind}", got=value_text(value))
    return tuple(value)
