"""Mixup (Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412): its setting, and the mixing
of a batch's samples and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from fedprune.core.rng import keyed_generator
from fedprune.core.settings import bounded
from fedprune.model.loss import Array
from fedprune.model.rule import SettingRule

# With a smaller α hardly any draw would mix anything; with the smallest floats 1/α overflows, and drawing fails.
MIN_MIXUP = 1e-3

_HINT = "Only labels that all count, and are classes or values but not a teacher's outputs, can be mixed."

RULES = (
    SettingRule("mixup", "ignore_label", lambda recipe: recipe.ignore_label is None, "one of the two", _HINT),
    SettingRule("mixup", "loss", lambda recipe: recipe.can_mix, "one of the two", _HINT),
)

MakeSamples = Callable[[], Array]


@dataclass(frozen=True)
class Mixup:
    """The setting of mixup.

    Attributes:
        mixup: α of mixup (Zhang et al. 2018, eq. 1 and 2): every step trains on λ·x + (1 − λ)·x', λ ~ Beta(α, α), where
            x' are its samples in another order, and on labels that are mixed alike; 0 for samples as they are. Token
            ids can't be mixed: where a model reads them, training continues without.
    """

    mixup: float = bounded(0.0, MIN_MIXUP, 10, or_zero=True)

    @property
    def mixes_samples(self) -> bool:
        return self.mixup > 0

    def mix_batch(
        self, batches: Sequence[tuple[MakeSamples, Array]], seed: int, round_: int, device: str, step: int
    ) -> tuple[list[tuple[MakeSamples, Array, Array | None]], npt.NDArray[np.float32]]:
        """Mix the samples of a batch within each micro-batch, when its samples are requested.

        As in the authors' code: one λ per batch, whose samples are paired with a permutation of themselves. Numbers to
        predict, and labels from 0 to 1, are mixed like samples; class labels stay, and have partners. `batches` has per
        micro-batch a function that makes its samples, and their labels. Returns the same for the mixed samples, with
        the partners' classes; and λ (float32, shape []), the share of each sample itself.
        """
        # Keyed by device and step, so that a resumed round and a simulation mix the same samples.
        rng = keyed_generator(seed, round_, device, "mixup", step)
        share = np.float32(rng.beta(self.mixup, self.mixup))
        mixed_batches: list[tuple[MakeSamples, Array, Array | None]] = []
        for make, y in batches:
            order = rng.permutation(len(y))
            labels = (y, y[order]) if y.dtype.kind == "i" else (_mix(y, order, share), None)
            mixed_batches.append((partial(_make_mixed, make, order, share), *labels))
        return mixed_batches, np.asarray(share)


def _make_mixed(make: MakeSamples, order: npt.NDArray[np.int64], share: np.float32) -> Array:
    return _mix(make(), order, share)


def _mix(value: Array, order: npt.NDArray[np.int64], share: np.float32) -> Array:
    """λ·v + (1 − λ)·v′ in float32, where v′ is v in another order."""
    # Indexing by an array copies, so that the mixing can be done in place: a batch may be a step's largest array.
    mixed = np.asarray(value[order], np.float32)
    mixed *= np.float32(1) - share
    mixed += share * value
    return mixed
