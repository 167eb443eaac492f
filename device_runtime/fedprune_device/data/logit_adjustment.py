"""What a board's own labels say about its predictions: how likely a class is here, and which never occur."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedprune.training.recipe import Recipe
from fedprune_device.data.labels import class_presence, log_prior


@dataclass(frozen=True)
class LogitAdjustment:
    """Turns the logits of a model into those of the board's own predictions, as its training did.

    Attributes:
        offset: Added to the logits [classes], where the recipe adjusts them; None where not.
        present: 1 for the classes that the board has samples of, 0 for those whose logits are replaced by 0, where the
            recipe masks absent classes (HeteroFL, Diao et al. 2021, Sec. 3.3; the authors' code masks local tests,
            too); None where not.
    """

    offset: tuple[float, ...] | None = None
    present: tuple[float, ...] | None = None

    @classmethod
    def of(cls, y: npt.NDArray[np.int64], recipe: Recipe, classes: int) -> LogitAdjustment:
        """What follows from the board's training labels and the recipe.

        Raises:
            DataError: A label is out of range.
        """
        offset = log_prior(y, classes) if recipe.logit_adjustment else None
        present = class_presence(y, classes) if recipe.mask_absent_classes else None
        return cls(
            None if offset is None else tuple(map(float, offset)),
            None if present is None else tuple(map(float, present)),
        )

    def __call__(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The logits [n, classes] of own predictions; in the order of the training graph, masked last."""
        if self.offset is not None:
            logits = logits + np.array(self.offset, np.float32)
        if self.present is not None:
            logits = np.where(np.array(self.present) > 0, logits, np.float32(0))
        return logits
