"""Loads and runs an engine like a session of onnxruntime, so that a predictor can take either, and compares the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import EngineError, shape_text
from fedprune.core.rng import keyed_generator
from fedprune.model import step_contract
from fedprune.model.input_type import InputType
from fedprune.runtime.gpu_gate import GPU_GATE
from fedprune.runtime.session import RunsGraph
from fedprune_device.engines.bindings import Bindings, TensorRTErrors
from fedprune_device.engines.cuda import Stream

Array = npt.NDArray[Any]

# TensorRT's names of the types that inputs and outputs of our graphs have. INT8 and BF16 stay inside an engine.
_TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8}

# Samples of the check of an engine: enough to see a wrong one, few enough that onnxruntime predicts them in a moment.
_MAX_TRIAL_SAMPLES = 16


class Engine:
    """An engine in the GPU's memory. One run at a time.

    Inputs and outputs are named as onnxruntime names them; free dimensions are None.
    """

    def __init__(self, bindings: Bindings, raw: bytes) -> None:
        self._errors = TensorRTErrors()
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._batch: tuple[int, int] | None = None
        self.inputs: dict[str, tuple[str, tuple[int | str | None, ...]]] = {}
        self.outputs: tuple[str, ...] = ()
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        with GPU_GATE.use():
            with self._errors.translate("the engine can't be loaded"):
                self._load(bindings.trt, raw)
            self._stream = Stream(bindings.cuda)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the engine, in chunks if there are more samples than it takes at once; by default for all outputs."""
        if set(feeds) != set(self.inputs):
            raise EngineError("inputs of the engine", expected=", ".join(self.inputs), got=", ".join(feeds))
        samples = len(next(iter(feeds.values())))
        min_batch, max_batch = self._batch or (samples, samples)
        chunk_outputs = []
        for start in range(0, max(samples, 1), max(max_batch, 1)):
            chunk = {n: v[start : start + max_batch] for n, v in feeds.items()}
            count = len(next(iter(chunk.values())))
            # Fewer samples than the engine takes are padded with zeros; even an empty batch tells the outputs' shape.
            batch_size = max(count, min_batch)
            padded_chunk = {
                n: np.concatenate([v, np.zeros((batch_size - count, *v.shape[1:]), v.dtype)]) for n, v in chunk.items()
            }
            with GPU_GATE.use(), self._errors.translate("the engine failed"):
                chunk_outputs.append({n: v[:count] for n, v in self._run(padded_chunk).items()})
        names = list(outputs) if outputs is not None else list(self.outputs)
        return {n: np.concatenate([p[n] for p in chunk_outputs]) for n in names}

    def close(self) -> None:
        with GPU_GATE.use():
            self._stream.close()
            # In this order: TensorRT wants a context to end before its engine, and the engine before its runtime.
            self._context = self._engine = self._runtime = None

    def _load(self, trt: Any, raw: bytes) -> None:
        self._logger = self._errors.logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(raw)
        if self._engine is None:
            raise self._errors.error("TensorRT doesn't load the engine")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._errors.error("there is no memory to run the engine in")
        for i in range(self._engine.num_io_tensors):
            name = str(self._engine.get_tensor_name(i))
            kind = self._engine.get_tensor_dtype(name).name
            if kind not in _TYPES:
                raise EngineError(f"tensor {name} of the engine", expected=" or ".join(_TYPES), got=kind)
            self._dtypes[name] = np.dtype(_TYPES[kind])
            if self._engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT:
                self.outputs = (*self.outputs, name)
                continue
            shape = tuple(self._engine.get_tensor_shape(name))
            # Token ids are int64 in graphs; TensorRT 8 has no int64 and takes them as int32.
            kind = {"i": "int64", "u": "uint8"}.get(self._dtypes[name].kind, "float")
            self.inputs[name] = (f"tensor({kind})", tuple(None if d < 0 else int(d) for d in shape))
            if shape and shape[0] < 0:
                min_shape, _, max_shape = (tuple(s) for s in self._engine.get_tensor_profile_shape(name, 0))
                self._batch = max(1, int(min_shape[0])), int(max_shape[0])

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        context, stream = self._context, self._stream
        input_copies = []  # must stay alive until `wait` returns: the stream copies from them asynchronously
        for name, value in feeds.items():
            array = np.ascontiguousarray(value, self._dtypes[name])
            if not context.set_input_shape(name, array.shape):
                raise self._errors.error(f"input {name} of shape {list(array.shape)} doesn't fit the engine")
            address = stream.buffer_address(name, array.nbytes)
            stream.copy_to_device(address, array)
            self._bind_memory(name, address)
            input_copies.append(array)
        results = {}
        for name in self.outputs:
            array = np.empty(tuple(context.get_tensor_shape(name)), self._dtypes[name])
            self._bind_memory(name, stream.buffer_address(name, array.nbytes))
            results[name] = array
        if not context.execute_async_v3(stream.handle):
            raise self._errors.error("the engine failed")
        for name, array in results.items():
            stream.copy_from_device(array, stream.buffer_address(name, array.nbytes))
        stream.wait()
        return results

    def _bind_memory(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise self._errors.error(f"the engine refuses memory for {name}")


class WrongOutputError(EngineError):
    """An engine computes something else than onnxruntime."""


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
