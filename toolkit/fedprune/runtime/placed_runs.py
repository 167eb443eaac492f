"""Runs of a graph with arrays that stay in a GPU's memory; repeated runs are recorded as CUDA graphs.

A step of a small net is a thousand kernels of a few microseconds, and launching one takes onnxruntime longer than the
GPU takes to compute it. A CUDA graph launches all of them at once
(https://onnxruntime.ai/docs/performance/tune-performance/iobinding.html, and `enable_cuda_graph` of the CUDA provider).
It reads and writes the addresses that it was recorded with, so every array of a recorded run stays where it is.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ExitCode, FedpruneError
from fedprune.runtime.gpu_gate import GPU_GATE

Array = npt.NDArray[Any]

# Recordings of one session; each holds a copy of its inputs on the GPU. A trainer's steps alternate between two
# places of the state, and an epoch's last batch may be smaller, so that each width of a simulation needs four.
MAX_RECORDINGS = 16

# Equal runs before one is recorded: recording takes as long as three runs, so fewer repetitions gain nothing.
_MIN_REPETITIONS = 3

# Counted runs; if so many differ, as with images of all sizes, the counts start again instead of growing.
_MAX_SIGNATURES = 64

# Bound runs of one session. A trainer's steps alternate between two places of the state, and an epoch's last step may
# have further outputs.
_MAX_BOUND_RUNS = 4

# Bytes of feeds up to which a run stays bound. It holds its batch and sums of gradients until its arrays are written
# again, two steps later: more memory than planned for. Where feeds are larger, binding takes little beside computing.
_MAX_BOUND_BYTES = 1 << 22

# onnxruntime's key of a run, and its value for a run that is neither recorded nor replayed.
_GRAPH_ID_OPTION, _NO_GRAPH_ID = "gpu_graph_id", "-1"


class GpuLostError(FedpruneError):
    """The GPU has failed, and the arrays in its memory are lost."""

    exit_code = ExitCode.RUNTIME


class PlacedArray:
    """An array in a GPU's memory. `numpy.asarray(placed)` copies it back once no run is being recorded, or raises
    `GpuLostError` if the GPU has failed."""

    def __init__(self, value: Any) -> None:
        self.value = value  # an OrtValue
        self.shape: tuple[int, ...] = tuple(value.shape())

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        try:
            with GPU_GATE.use():
                array: Array = self.value.numpy()
        except Exception as error:
            raise GpuLostError(f"the GPU has failed ({str(error)[:300]})") from error
        return array if dtype is None else array.astype(dtype, copy=False)


class PlacedRuns:
    """Runs of one `onnxruntime.InferenceSession` on a GPU, which can be recorded if the session `records`; threads wait
    for each other. `runtime` is the module onnxruntime."""

    def __init__(self, session: Any, runtime: Any, *, records: bool) -> None:
        self.session, self._runtime = session, runtime
        self._lock = threading.Lock()
        # Further arguments of a run that must not be recorded.
        self.unrecorded_options: tuple[Any, ...] = (self._options(_NO_GRAPH_ID),) if records else ()
        self._can_record = records
        self._placed: dict[tuple[str, str, tuple[int, ...], str], PlacedArray] = {}
        self._counts = Counter[Hashable]()
        self._recordings: dict[Hashable, _Recording] = {}

    def place(self, arrays: Mapping[str, Array], role: str) -> dict[str, PlacedArray]:
        """Copy arrays into the GPU's memory. Arrays of the same role, name and shape overwrite earlier ones, so that
        recordings with these addresses stay valid; those of other shapes are released unless a recording has them."""
        placed = {}
        with self._lock, GPU_GATE.use():
            recorded = {id(array) for recording in self._recordings.values() for array in recording.arrays}
            names = {(role, name) for name in arrays}
            # Before new ones: a simulation trains one width after another, and each may need half of the memory.
            for key in [k for k, v in self._placed.items() if k[:2] in names and id(v) not in recorded]:
                array = arrays[key[1]]
                if key[2:] != (array.shape, array.dtype.str):
                    del self._placed[key]
            for name, array in arrays.items():
                array = np.asarray(array, order="C")
                key = role, name, array.shape, array.dtype.str
                if key in self._placed:
                    self._placed[key].value.update_inplace(array)
                else:
                    self._placed[key] = self._put(array)
                placed[name] = self._placed[key]
        return placed

    def run(self, names: Sequence[str], feeds: Mapping[str, Any], into: Mapping[str, Any]) -> dict[str, Any]:
        """Run the session. Outputs are written into the arrays of `into`; the others are copied back."""
        with self._lock:
            signature = _signature(names, feeds, into)
            recording = self._recordings.get(signature)
            if recording is not None:
                try:
                    with GPU_GATE.use() if recording.has_run else GPU_GATE.record():
                        return recording.run(feeds)
                except Exception:
                    # A first run that fails may only be impossible to record; a later failure is the GPU's.
                    if recording.has_run:
                        raise
                    self._stop_recording()
            with GPU_GATE.use():
                outputs = BoundRun(self.session, names, into).run(feeds, self.unrecorded_options)
            if self._can_record and all(isinstance(array, PlacedArray) for array in into.values()):
                self._count_run(signature, feeds, outputs)
            return outputs

    def _count_run(self, signature: Hashable, feeds: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Count a run that could be recorded, and prepare its recording where it repeats."""
        if len(self._counts) > _MAX_SIGNATURES:
            self._counts.clear()
        self._counts[signature] += 1
        if self._counts[signature] < _MIN_REPETITIONS or len(self._recordings) >= MAX_RECORDINGS:
            return
        options, binding = self._options(str(1 + len(self._recordings))), self.session.io_binding()
        try:
            with GPU_GATE.use():
                self._recordings[signature] = _Recording(self._put, self.session, binding, options, feeds, outputs)
        except Exception:  # noqa: BLE001 - such as no memory for its copies; the run itself went well
            self._stop_recording()

    def _stop_recording(self) -> None:
        """Record nothing from now on, and forget all recordings."""
        self._can_record = False
        self._recordings.clear()

    def _put(self, array: Array) -> PlacedArray:
        """A new copy in the GPU's memory."""
        return PlacedArray(self._runtime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))

    def _options(self, graph: str) -> Any:
        options = self._runtime.RunOptions()
        options.add_run_config_entry(_GRAPH_ID_OPTION, graph)
        return options


class BoundRun:
    """Runs of a session of onnxruntime without copies: arrays are read and written where they are, on the CPU or a GPU.
    Outputs without an array in `into` get a new one. What is bound stays so: a repetition binds only other feeds."""

    def __init__(self, session: Any, names: Sequence[str], into: Mapping[str, Any]) -> None:
        self._session, self._binding = session, session.io_binding()
        # By address: they must live as long as they are bound.
        self._inputs: dict[str, Any] = {}
        self._outputs = dict(into)
        self._new_names = [n for n in names if n not in into]
        for name, array in into.items():
            if isinstance(array, PlacedArray):
                self._binding.bind_ortvalue_output(name, array.value)
            else:
                self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self, feeds: Mapping[str, Any], options: Sequence[Any] = ()) -> dict[str, Any]:
        binding, inputs = self._binding, self._inputs
        for name, value in feeds.items():
            array = value if isinstance(value, PlacedArray) else np.asarray(value, order="C")
            if inputs.get(name) is not array:
                inputs[name] = array
                if isinstance(array, PlacedArray):
                    binding.bind_ortvalue_input(name, array.value)
                else:
                    binding.bind_cpu_input(name, array)
        for name in self._new_names:  # anew: else what the last run has returned would be written again
            binding.bind_output(name)
        self._session.run_with_iobinding(binding, *options)
        values = binding.get_outputs_as_ortvaluevector()  # `get_outputs` wraps each of them
        first = len(self._outputs)
        return self._outputs | {n: np.asarray(values[first + i].numpy()) for i, n in enumerate(self._new_names)}


class BoundRuns:
    """Runs of a session on the CPU that write into given arrays. The last ones with small feeds stay bound, because
    binding the arrays of a small net takes as long as computing a step. Threads may run at once."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._runs: dict[Hashable, BoundRun] = {}

    def run(self, names: Sequence[str], feeds: Mapping[str, Any], into: Mapping[str, Array]) -> dict[str, Any]:
        key = tuple(names), tuple(feeds), tuple(into), tuple(map(id, into.values()))
        # Taken out, so that no other thread has it, and that what fails isn't bound any more.
        run = self._runs.pop(key, None)
        if run is None:
            run = BoundRun(self._session, names, into)
            if sum(np.asarray(value).nbytes for value in feeds.values()) > _MAX_BOUND_BYTES:
                return run.run(feeds)
        outputs = run.run(feeds)
        if len(self._runs) >= _MAX_BOUND_RUNS:
            self._runs.clear()
        self._runs[key] = run
        return outputs

    def release(self) -> None:
        """Forget all arrays."""
        self._runs.clear()


def _signature(names: Sequence[str], feeds: Mapping[str, Any], into: Mapping[str, Any]) -> Hashable:
    """The key of a recording: the addresses of arrays on the GPU, and the shapes of all others."""

    def identity(value: Any) -> Hashable:
        return id(value) if isinstance(value, PlacedArray) else (value.shape, value.dtype.str)

    inputs = tuple((name, identity(value)) for name, value in feeds.items())
    return tuple(names), inputs, tuple((name, id(array)) for name, array in into.items())


class _Recording:
    """A run that is recorded when it runs for the first time, and replayed after that."""

    def __init__(
        self,
        put: Callable[[Array], PlacedArray],
        session: Any,
        binding: Any,
        options: Any,
        feeds: Mapping[str, Any],
        outputs: Mapping[str, Any],
    ) -> None:
        self._session, self._binding, self._options = session, binding, options
        self.has_run = False
        placed = {n: v for n, v in feeds.items() if isinstance(v, PlacedArray)}
        self._inputs = {n: put(np.asarray(v, order="C")) for n, v in feeds.items() if n not in placed}
        self._outputs = {n: v if isinstance(v, PlacedArray) else put(np.zeros_like(v)) for n, v in outputs.items()}
        self._copied_names = [n for n, v in outputs.items() if not isinstance(v, PlacedArray)]
        # The addresses that were recorded must stay theirs.
        self.arrays = [*placed.values(), *self._inputs.values(), *self._outputs.values()]
        for name, value in {**placed, **self._inputs}.items():
            binding.bind_ortvalue_input(name, value.value)
        for name, value in self._outputs.items():
            binding.bind_ortvalue_output(name, value.value)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        for name, value in self._inputs.items():
            value.value.update_inplace(np.asarray(feeds[name], order="C"))
        self._session.run_with_iobinding(self._binding, self._options)
        self.has_run = True
        # By their values: who runs this holds the gate, which `numpy.asarray` would wait for.
        return {**self._outputs, **{name: self._outputs[name].value.numpy() for name in self._copied_names}}
