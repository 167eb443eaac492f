"""Computes a user's file's own outputs from logits: the end of the file that decides, such as ArgMax.

A model is trained and cut without this end. It travels as text in the metadata of every inference graph, so that
neither lower precisions nor engines of TensorRT have to compute it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.model.step_contract import LOGITS
from fedprune.runtime.session import OnnxSession

Array = npt.NDArray[Any]

# The key of a model's metadata that holds its prediction head: an ONNX file in base64.
HEAD_KEY = "fedprune.head"

# A head has as many operators as the end of a file; a larger one would take longer than the model itself.
_MAX_HEAD_BYTES = 64 * 2**20


class PredictionHead:
    """The graph from `logits` [n, classes, ...] to the outputs of a user's file, by its own names.

    Raises `ModelError` if the text is no such graph.
    """

    def __init__(self, text: str) -> None:
        try:
            raw = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ModelError(f"metadata {HEAD_KEY} is damaged ({error})") from error
        if len(raw) > _MAX_HEAD_BYTES:
            raise ModelError(f"metadata {HEAD_KEY}", expected=f"at most {_MAX_HEAD_BYTES} bytes", got=len(raw))
        self._session = OnnxSession(raw)
        if list(self._session.inputs) != [LOGITS]:
            raise ModelError(
                f"metadata {HEAD_KEY}", expected=f"a graph of {LOGITS}", got=", ".join(self._session.inputs) or "none"
            )

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> PredictionHead | None:
        """The head in a graph's metadata; None without one."""
        return cls(metadata[HEAD_KEY]) if metadata.get(HEAD_KEY) else None

    def outputs(self, logits: Array) -> dict[str, Array]:
        """The file's own outputs for logits, by name; texts are arrays of text, not of objects."""
        outputs = self._session.run({LOGITS: np.ascontiguousarray(logits, np.float32)})
        return {name: value.astype(str) if value.dtype == object else value for name, value in outputs.items()}
