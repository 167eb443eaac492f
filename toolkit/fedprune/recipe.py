"""What a board is asked to do with its data in one round.

The *features* of a recipe decide which inputs a training graph has, so they name the graph; everything else is a number
that is fed at run time and never needs a new graph.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedprune.errors import ConfigError


@dataclass(frozen=True)
class Features:
    """Optional inputs of a training graph.

    Attributes:
        logit_offset: A vector [classes] added to the logits before the loss (logit adjustment by label prior).
        class_weight: A vector [classes] of loss weights, used as torch does: sum of w·loss over sum of w.
        class_mask: A vector [classes]: logits of classes with 0 are replaced by 0 before the loss (HeteroFL).
        proximal: Per trainable tensor an anchor and a strength µ: adds µ/2 · |w − anchor|² to the loss.
        element_mask: Per trainable tensor a 0/1 mask: masked elements are 0 in the forward pass and stay put.
        gradients: The gradients are outputs, too.
    """

    logit_offset: bool = False
    class_weight: bool = False
    class_mask: bool = False
    proximal: bool = False
    element_mask: bool = False
    gradients: bool = False

    @property
    def key(self) -> str:
        """Short text that names this combination."""
        return "+".join(f.name for f in fields(self) if getattr(self, f.name)) or "plain"


@dataclass(frozen=True)
class Recipe:
    """Local training of one round.

    Attributes:
        epochs: Passes over the local data.
        batch_size: Samples per step; the last batch of an epoch may be smaller.
        lr: Learning rate of SGD.
        momentum: Momentum of SGD, below 1; the buffer starts at zero every round.
        weight_decay: Added to gradients as weight_decay · w.
        proximal: Strength µ of the pull towards the weights that were received; 0 leaves it out.
        logit_adjustment: Add the log of the device's own (smoothed) label shares to the logits in the loss and in
            personal predictions: log((n_c + 0.1) / (n + 0.1·C)).
        mask_absent_classes: Take classes that the device has no sample of out of the loss (HeteroFL's masked loss).
        balance_classes: Weigh classes by the inverse of their local share.
        max_steps: Upper limit of steps, 0 for none.
    """

    epochs: int = 1
    batch_size: int = 32
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    proximal: float = 0.0
    logit_adjustment: bool = False
    mask_absent_classes: bool = False
    balance_classes: bool = False
    max_steps: int = 0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "epochs": (1, 10_000),
            "batch_size": (1, 65_536),
            "lr": (0, 1_000),
            "momentum": (0, 1),
            "weight_decay": (0, 1_000),
            "proximal": (0, 1e6),
            "max_steps": (0, 10**9),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            whole = name in ("epochs", "batch_size", "max_steps")
            if (
                isinstance(value, bool)
                or not isinstance(value, int if whole else (int, float))
                or not math.isfinite(value)
                or not low <= value <= high
                or (name == "momentum" and value == high)  # the buffer would never forget
            ):
                below = "below " if name == "momentum" else ""
                raise ConfigError(
                    f"recipe: {name}",
                    expected=f"{'a whole number' if whole else 'a number'} from {low} to {below}{high}",
                    got=repr(value),
                )

    @property
    def features(self) -> Features:
        """The training graph that this recipe needs."""
        return Features(
            logit_offset=self.logit_adjustment,
            class_weight=self.balance_classes,
            class_mask=self.mask_absent_classes,
            proximal=self.proximal > 0,
        )

    def steps(self, samples: int) -> int:
        """Optimiser steps for this many local samples."""
        steps = self.epochs * -(-samples // self.batch_size)
        return min(steps, self.max_steps) if self.max_steps else steps

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Recipe:
        """Read and check.

        Raises:
            ConfigError: An unknown key, a wrong type or a number out of range.
        """
        known = {f.name: f for f in fields(cls)}
        for key, value in body.items():
            if key not in known:
                raise ConfigError(f"recipe: unknown key {key!r}", expected=", ".join(known))
            if isinstance(known[key].default, bool) and not isinstance(value, bool):
                raise ConfigError(f"recipe: {key}", expected="true or false", got=repr(value))
        return cls(**body)

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
