"""Samples with labels that a report measures a model on, and the score of a model on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, ModelError
from fedprune.model.step_contract import LOGITS, X
from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Graph

Array = npt.NDArray[Any]

# The kinds of labels: the number of one class, a 0 or 1 per class, or the values that the output should have.
LABEL_KINDS = ("classes", "multi", "values")

# Samples per run: the outputs of all samples at once may not fit in memory.
_SCORE_BATCH = 64


@dataclass(frozen=True, eq=False)
class LabelledData:
    """Checked samples.

    Attributes:
        x: Inputs [n, ...], of the type that the model takes.
        y: Whole numbers [n, ...] for classes; else float32 of the outputs' shape.
        label_kind: What `y` is, one of `LABEL_KINDS`.
        ignored_label: The class of labels that count for nothing.
        full_score: The score of the whole model, if it was measured.
    """

    x: Array
    y: Array
    label_kind: str
    ignored_label: int | None = None
    full_score: float | None = None

    @property
    def score_name(self) -> str:
        """The name of the score."""
        return {"classes": "accuracy", "multi": "accuracy over all labels", "values": "root of the mean squared error"}[
            self.label_kind
        ]

    def score(self, outputs: Callable[[Array], Array]) -> float:
        """The score of a model, a function of inputs: a share of right answers, or for values an error."""
        batches = [outputs(self.x[s : s + _SCORE_BATCH]) for s in range(0, len(self.x), _SCORE_BATCH)]
        results = np.concatenate(batches)
        if self.label_kind == "classes":
            # Positions with the ignored label count neither as right nor as wrong.
            is_right, is_counted = results.argmax(axis=1) == self.y, self.y != self.ignored_label
            return int(np.count_nonzero(is_right & is_counted)) / max(1, int(np.count_nonzero(is_counted)))
        if self.label_kind == "multi":
            # Logits: a probability above one half.
            return float(np.mean((results > 0) == (self.y > 0.5)))
        # In float64, since squares of float32 outputs may overflow.
        return float(np.sqrt(np.mean((results.astype(np.float64) - self.y) ** 2)))

    def score_of(self, graph: Graph) -> float:
        """The score of an inference graph. Raises `DataError` if it doesn't take these samples."""
        session = OnnxSession(graph.to_bytes())

        def outputs(x: Array) -> Array:
            try:
                return session.run({X: x})[LOGITS]
            except ModelError as error:
                raise DataError(f"the model doesn't take the samples of --data ({error})") from error

        return self.score(outputs)
