"""Random augmentation of the samples of a step, by the graphs in a training graph's metadata."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError, TrainingError
from fedprune.core.rng import keyed
from fedprune.model.step_contract import AUGMENT_X, AUGMENT_Y, AUGMENTED, NUMBERS, X, Y
from fedprune.runtime.session import Session
from fedprune_device.data.batches import Part

Array = npt.NDArray[Any]


class Augmentation:
    """The graphs of a recipe's augmentations, by the contract of `step_contract.AUGMENT_X`.

    Raises `TrainingError` if the metadata has none, or they can't be loaded.
    """

    def __init__(self, metadata: Mapping[str, str], threads: int = 1) -> None:
        if AUGMENT_X not in metadata:
            raise TrainingError(
                "training graph and recipe don't fit each other",
                expected="a graph of the recipe's augmentations",
                got="none",
            )
        self._graphs = {
            name: _session(metadata[key], threads) for name, key in ((X, AUGMENT_X), (Y, AUGMENT_Y)) if key in metadata
        }
        count = self._graphs[X].inputs[NUMBERS][1][-1]
        if not isinstance(count, int):
            raise TrainingError("augmentation", expected=f"a fixed size of {NUMBERS}", got=count)
        self._count = count

    def __call__(self, part: Part, seed: int, *key: object) -> Part:
        """The part with its samples augmented when they are requested, by random numbers that `seed` and `key` decide;
        its labels move along where they are places."""

        def augmented(name: str, values: Array) -> Array:
            numbers = keyed(seed, *key).random((len(values), self._count), np.float32)
            try:
                return self._graphs[name].run({name: values, NUMBERS: numbers})[AUGMENTED]
            except ModelError as error:
                raise TrainingError(f"augmentation failed: {error}") from error

        y = augmented(Y, part.y) if Y in self._graphs else part.y
        return replace(part, make=lambda: augmented(X, part.x), y=y)


def _session(text: str, threads: int) -> Session:
    try:
        return Session(base64.b64decode(text, validate=True), threads=threads)
    except (binascii.Error, ValueError) as error:
        raise TrainingError("the training graph's augmentation", expected="an ONNX file in base64") from error
    except ModelError as error:
        raise TrainingError(f"the training graph's augmentation: {error}") from error
