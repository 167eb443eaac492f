"""Does a bundle compute what the whole model computes without the channels that were cut?"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import ModelError
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.model.step_contract import LOGITS, X, Y, following
from fedprune.runtime.bundle import BASE, INFERENCE, TRAINING, WEIGHTS
from fedprune.runtime.session import Session
from fedprune_export.checks.step_feeds import random_labels, step_feeds
from fedprune_export.ir.trace import sample_feeds
from fedprune_export.pruning.cut import masked
from fedprune_export.pruning.model import Model

SAMPLES = 7  # random inputs of the check

_STEP_SAMPLES = 2  # more than one, so that batch norms have something to normalise by

LIMIT = 1e-4  # float32 sums in another order differ by less than 1e-5; more means that the cut is wrong


def parity(model: Model, selection: Selection, files: Mapping[str, bytes]) -> float:
    """How far the files of a bundle are from the masked whole model on random inputs.

    Raises `ModelError` if they are too far from it, or onnxruntime doesn't load or run the inference graph.
    """
    x = sample_feeds(model.graph, SAMPLES)[X]
    with tempfile.TemporaryDirectory(prefix="fedprune-") as name:
        for file in files.keys() & {INFERENCE, WEIGHTS, BASE}:
            (Path(name) / file).write_bytes(files[file])
        small = Session(Path(name) / INFERENCE).run({X: x})[LOGITS]
    whole = Session(masked(model, selection).to_bytes()).run({X: x})[LOGITS]
    error = distance(small, whole)
    if not error <= LIMIT:
        raise ModelError(
            "the cut model computes something else than the masked one",
            expected=f"outputs equal to {LIMIT:g}",
            got=f"{error:.2g}",
            hint="Please report this with the model.",
        )
    return error


def try_step(model: Model, recipe: Recipe, files: Mapping[str, bytes], name: str = TRAINING) -> None:
    """Take a training step of a bundle with random samples: whether it runs is seen at the bundle's own widths.

    Raises `ModelError` if onnxruntime doesn't load or run the step, or a tensor comes out of it in another shape.
    """
    session = Session(files[name], training=True)
    tensors, classes = tensorfile.decode(files[WEIGHTS]), model.architecture.classes
    batch = session.inputs[X][1][0]
    samples = batch if isinstance(batch, int) else _STEP_SAMPLES
    x, y = sample_feeds(model.graph, samples)[X], random_labels(recipe, samples, classes, session.inputs[Y])
    frozen = tensorfile.decode(files[BASE]) if BASE in files else {}
    out = session.run(step_feeds(session.inputs, recipe, {**tensors, **frozen}, x, y, classes))
    for tensor, value in tensors.items():
        after = out.get(following(tensor), value)
        if after.shape != value.shape:
            raise ModelError(
                f"the training step changes the shape of {tensor}",
                expected=value.shape,
                got=after.shape,
                hint="Please report this with the model.",
            )


def distance(some: npt.NDArray[Any], reference: npt.NDArray[Any]) -> float:
    """The largest difference over the largest magnitude of the reference."""
    scale = max(float(np.abs(reference).max(initial=0)), float(np.finfo(np.float32).tiny))
    return float(np.abs(some - reference).max(initial=0)) / scale
