"""Compares the outputs of an engine with those of onnxruntime: a check that every engine must pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import EngineError, shape_text
from fedprune.core.rng import keyed_generator
from fedprune.model import step_contract
from fedprune.model.input_type import InputType
from fedprune.runtime.session import RunsGraph

Array = npt.NDArray[Any]


class WrongOutputError(EngineError):
    """An engine computes something else than onnxruntime."""


# Enough samples to see a wrong engine, few enough that onnxruntime predicts them on the processor in a moment.
_MAX_TRIAL_SAMPLES = 16


def trial_inputs(inputs: Mapping[str, tuple[str, tuple[int | str | None, ...]]], max_batch: int) -> Array:
    """Inputs for the check: fixed noise, one sample more than `max_batch`, at most 17; zeros for whole numbers."""
    kind, shape = inputs[step_contract.X]
    sizes = [d if isinstance(d, int) else 1 for d in shape[1:]]
    noise = keyed_generator(0, "engine").standard_normal((min(max_batch, _MAX_TRIAL_SAMPLES) + 1, *sizes))
    input_type = InputType.of(kind)
    return np.zeros(noise.shape, input_type.dtype) if input_type.is_whole else noise.astype(np.float32)


def trial_outputs(session: RunsGraph, x: Array) -> Array:
    """A model's outputs for a batch, and for its first sample: batches of both sizes must be right."""
    batch_outputs = session.run({step_contract.X: x}, [step_contract.LOGITS])[step_contract.LOGITS]
    single_output = session.run({step_contract.X: x[:1]}, [step_contract.LOGITS])[step_contract.LOGITS]
    return np.concatenate([batch_outputs, single_output]).astype(np.float32)


def checked_deviation(outputs: Array, expected: Array, tolerance: float) -> float:
    """The largest difference between an engine's outputs and onnxruntime's, relative to 1 plus the largest of those.

    Raises `WrongOutputError` if the difference exceeds `tolerance`, shapes differ or outputs are not finite.
    """
    if outputs.shape != expected.shape:
        raise WrongOutputError(
            "shape of the engine's outputs", expected=shape_text(*expected.shape), got=shape_text(*outputs.shape)
        )
    if not np.isfinite(outputs).all():
        raise WrongOutputError("the engine's outputs are not finite")
    if not outputs.size:
        return 0.0
    largest_difference = float(np.abs(outputs - expected).max() / (1 + np.abs(expected).max()))
    if not largest_difference <= tolerance:  # not `>`, which a NaN would pass
        raise WrongOutputError(
            "the engine contradicts onnxruntime",
            expected=f"a deviation of at most {tolerance:g}",
            got=f"{largest_difference:.3g}",
        )
    return largest_difference
