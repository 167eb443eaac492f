"""Opens sessions of onnxruntime, on the CPU or a GPU; no other module opens one."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import MissingExtraError, ModelError, RuntimeUnavailableError
from fedprune.runtime.gpu_gate import GPU_GATE
from fedprune.runtime.missing_kernels import missing_kernels_reason, missing_provider_reason
from fedprune.runtime.placed_runs import BoundRuns, GpuLostError, PlacedArray, PlacedRuns
from fedprune.runtime.session_process import RemoteSession, SessionProcess, serve_sessions

Array = npt.NDArray[Any]

# Wheels of onnxruntime report usage to their maker. Boards promise that nothing leaves them but weights, and
# their links are counted by the byte: it stays off, here and in child processes, unless the environment sets it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


_LOG = logging.getLogger("fedprune.runtime.session")

# The causes for computing on the CPU that this process has logged, each once: it opens a session for every width.
_LOGGED_CAUSES: set[str] = set()

# Causes that hold addresses or sizes differ every time; after so many the log has said enough.
_MAX_LOGGED_CAUSES = 20

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# A Jetson's GPU shares the board's memory, so the arena grows by no more than is requested. An exhaustive search of
# convolutions would be repeated for every new shape. Models trained in float32 are computed in float32, without TF32
# (https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html).
CUDA_OPTIONS = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}


class RunsGraph(Protocol):
    """Anything that runs a loaded graph: a session of onnxruntime, or an engine in its place."""

    @property
    def inputs(self) -> Mapping[str, tuple[str, tuple[int | str | None, ...]]]:
        """Type and shape by input name; dimensions that are free are names or None."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Arrays by output name; see `OnnxSession.run`."""


class OnnxSession:
    """A loaded graph, on the CPU unless CUDA is asked for and works.

    Memory patterns are off (batches and widths vary, and they cost memory without gaining time), threads don't spin (a
    board serves predictions while it trains) and, for training graphs, optimisation is basic: it halves the load time
    at the same speed. Threads may run it at once. Raises `MissingExtraError` if onnxruntime is not installed,
    `ModelError` if it doesn't accept the graph.

    Args:
        model: A file, or the bytes of one (then without external data).
        threads: Threads inside an operator; 0 takes one per core.
        cuda: Whether to compute on an NVIDIA GPU. Where that fails, now or while it runs, the CPU takes over: a graph
            keeps nothing from run to run, so that nothing is lost.
        training: Whether the graph trains.
        records: Whether a training graph's repeated runs on arrays in the GPU's memory (`place`) are recorded once and
            then replayed (CUDA graphs).
        exact: Whether operators are computed as the graph has them, one by one: int8 by its definition, in float32. The
            kernels of int8 are faster, but on x86 without VNNI they saturate, as boards' processors do not.

    Attributes:
        inputs: Type and shape by input name; `outputs` are names, and `output_types` types and shapes by name.
        metadata: What the graph's maker wrote into it.
        cpu_reason: Why it is the CPU although CUDA was asked for; empty otherwise.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int = 1,
        training: bool = False,
        cuda: bool = False,
        records: bool = True,
        exact: bool = False,
    ) -> None:
        self._open = partial(_load, model, threads, training, exact=exact)
        self.cpu_reason = ""
        self._lock = threading.Lock()
        self._placed: PlacedRuns | None = None
        self._session: Any = self._open_on_cuda(records=training and records) if cuda else None
        if self._session is None:
            self._session = self._open(_CPU)
        self._bound = self._bound_runs()
        self.inputs: dict[str, tuple[str, tuple[int | str | None, ...]]] = {
            i.name: (i.type, tuple(i.shape)) for i in self._session.get_inputs()
        }
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.output_types = {o.name: (o.type, tuple(o.shape)) for o in self._session.get_outputs()}
        self.outputs: tuple[str, ...] = tuple(self.output_types)
        if self.provider == "cpu":
            # It holds the graph's bytes, which are needed again only for a move from the GPU to the CPU.
            del self._open

    @property
    def provider(self) -> str:
        """The provider: `cpu` or `cuda`."""
        return "cuda" if _is_on_cuda(self._session) else "cpu"

    def keep(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Feeds of several runs, for the argument `kept_feeds` of `run`: a child process receives them once."""
        return self._session.keep(feeds) if isinstance(self._session, RemoteSession) else feeds

    def place(self, arrays: Mapping[str, Array], role: str) -> dict[str, Any]:
        """Copies of arrays where the graph is computed, as feeds and outputs of many runs without further copies. They
        take the place of what was placed in the same role before. On the CPU they are the arrays themselves."""
        runs = self._placed
        if runs is None:
            return dict(arrays)
        try:
            return {**runs.place(arrays, role)}
        except Exception as error:  # noqa: BLE001 - no memory, most likely; the processor has the arrays
            self.leave_gpu(error)
            return dict(arrays)

    def release(self) -> None:
        """Forget the arrays of earlier runs, which otherwise stay bound."""
        if self._bound is not None:
            self._bound.release()

    def leave_gpu(self, error: Exception) -> None:
        """Compute on the CPU from now on, because of an error."""
        with self._lock:
            if _is_on_cuda(self._session):
                self._leave_cuda(self._open(_CPU), error)

    def run(
        self,
        feeds: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        into: Mapping[str, Any] | None = None,
        kept_feeds: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Run the graph once.

        Raises `GpuLostError` if the GPU has failed and arrays in its memory can't be read, `RuntimeUnavailableError` if
        the child process that runs the graph doesn't start or ended twice, `ModelError` if feeds or arrays don't fit
        the graph or an operator fails.

        Args:
            feeds: By input name an array, or one of `place`.
            outputs: Names of the outputs to compute; all by default.
            into: By output name the array to write it into: writeable, in C order, of the output's type and shape, or
                one of `place`. None may be a feed, because an operator may still read it after the output was written.
            kept_feeds: Further feeds, from `keep`.
        """
        names = list(outputs) if outputs is not None else list(self.outputs)
        runs, into, kept_feeds = self._placed, into or {}, kept_feeds or {}
        session = self._session if runs is None else runs.session  # another thread may replace it
        # Only where a GPU has computed: to look at each array of a small step takes a tenth of its time.
        had_gpu = runs is not None or bool(self.cpu_reason)
        placed = had_gpu and any(isinstance(v, PlacedArray) for v in (*feeds.values(), *into.values()))
        if placed and runs is None:  # the GPU has failed since
            feeds, into = {n: np.asarray(v) for n, v in feeds.items()}, _host_arrays(into)
        _check_output_arrays(into, names)
        all_feeds = {**feeds, **kept_feeds}
        try:
            if isinstance(session, RemoteSession):
                values: list[Array] = session.run(names, feeds, kept_feeds)
            elif runs is not None:
                if placed:
                    return runs.run(names, all_feeds, into)
                with GPU_GATE.use():
                    values = session.run(names, all_feeds, *runs.unrecorded_options)
            elif into and self._bound is not None:
                return self._bound.run(names, all_feeds, into)
            else:
                values = session.run(names, all_feeds)
        except Exception as error:
            if not _is_on_cuda(session):
                if isinstance(error, RuntimeUnavailableError):
                    raise
                raise ModelError(f"onnxruntime couldn't run the graph ({_first_line(error)})") from error
            values = self._run_on_cpu(session, names, all_feeds, error)
            into = _host_arrays(into)
        arrays_by_name = dict(zip(names, map(np.asarray, values), strict=True))
        for name, array in into.items():
            _copy_output(name, arrays_by_name[name], array)
        return {**arrays_by_name, **into}

    def _open_on_cuda(self, *, records: bool) -> Any:
        if _CUDA not in _onnxruntime().get_available_providers():
            self._log_no_cuda(missing_provider_reason(onnxruntime_version()))
            return None
        records = records and _process is None
        try:
            with GPU_GATE.use():
                session = self._open_recording() if records else None
                records = session is not None
                session = session or self._open((_CUDA, CUDA_OPTIONS), _CPU)
        except ModelError as error:
            self._log_no_cuda(missing_kernels_reason(error, onnxruntime_version()) or str(error))
            return None
        # Where a library of CUDA is missing, onnxruntime doesn't fail but leaves the provider out.
        if not _is_on_cuda(session):
            self._log_no_cuda("onnxruntime's CUDA provider can't be loaded")
            return None
        if _process is None:
            self._placed = PlacedRuns(session, _onnxruntime(), records=records)
        return session

    def _open_recording(self) -> Any:
        """A session that can record runs; None where some operator of the graph would be left to the processor."""
        try:
            return self._open((_CUDA, {**CUDA_OPTIONS, "enable_cuda_graph": "1"}), _CPU)
        except ModelError:
            return None

    def _run_on_cpu(self, session: Any, names: list[str], feeds: Mapping[str, Any], error: Exception) -> list[Array]:
        """Repeat a failed run on the CPU, and stay there if it succeeds: otherwise the GPU is not to blame."""
        with self._lock:
            cpu_session = self._open(_CPU) if self._session is session else self._session
            try:
                host_feeds = {n: np.asarray(v) for n, v in feeds.items()}
            except GpuLostError:
                if self._session is session:
                    self._leave_cuda(cpu_session, error)
                raise
            try:
                values: list[Array] = cpu_session.run(names, host_feeds)
            except RuntimeUnavailableError:
                raise
            except Exception as cpu_error:
                raise ModelError(f"onnxruntime couldn't run the graph ({_first_line(cpu_error)})") from cpu_error
            if self._session is session:
                self._leave_cuda(cpu_session, error)
        return values

    def _bound_runs(self) -> BoundRuns | None:
        """The bound runs of a session on the CPU of this process."""
        return None if isinstance(self._session, RemoteSession) or self.provider != "cpu" else BoundRuns(self._session)

    def _leave_cuda(self, session: Any, error: Exception) -> None:
        self._log_no_cuda(missing_kernels_reason(error, onnxruntime_version()) or _first_line(error))
        self._session, self._placed = session, None
        self._bound = self._bound_runs()
        del self._open

    def _log_no_cuda(self, reason: str) -> None:
        self.cpu_reason = reason
        # Once a reason: a process opens a session for every width.
        if reason not in _LOGGED_CAUSES and len(_LOGGED_CAUSES) < _MAX_LOGGED_CAUSES:
            _LOGGED_CAUSES.add(reason)
            _LOG.warning("computing on the CPU instead of CUDA: %s", reason)


def _host_arrays(arrays: Mapping[str, Any]) -> dict[str, Array]:
    """Those of some arrays that are not in a GPU's memory."""
    return {n: v for n, v in arrays.items() if not isinstance(v, PlacedArray)}


def _check_output_arrays(into: Mapping[str, Any], names: Sequence[str]) -> None:
    for name, array in into.items():
        # The array's memory is written by address, so its layout has to be right.
        if name not in names or not (isinstance(array, PlacedArray) or array.flags.carray):
            raise ModelError(
                f"array for output {name}",
                expected="an output that is computed, and a writeable array in C order",
                got="another output" if name not in names else "another kind of array",
            )


def _copy_output(name: str, value: Array, target: Array) -> None:
    if (value.dtype, value.shape) != (target.dtype, target.shape):
        expected, got = (f"{a.dtype} {a.shape}" for a in (value, target))
        raise ModelError(f"array for output {name}", expected=expected, got=got)
    np.copyto(target, value)


def _is_on_cuda(session: Any) -> bool:
    return _CUDA in session.get_providers()


@contextmanager
def run_by_child_process() -> Iterator[None]:
    """Let a child process load and run the graphs of all sessions (`session_process`)."""
    global _process
    with SessionProcess(CHILD_PROGRAM) as _process:
        try:
            yield
        finally:
            _process = None


_process: SessionProcess | None = None

CHILD_PROGRAM = f"from {__name__} import main; main()"


def main() -> None:
    serve_sessions(load_graph)


def _load(*graph: Any, exact: bool = False) -> Any:
    return load_graph(*graph, exact=exact) if _process is None else _process.load(*graph, exact=exact)


def load_graph(model: Path | bytes, threads: int, training: bool, *providers: Any, exact: bool = False) -> Any:
    """onnxruntime's own session, in this process. Raises as `OnnxSession`."""
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # what fails comes as an exception; the log would print it a second time
    # Threads that sleep between operators take longer to wake than most operators of a training step take. They spin
    # while a step runs and sleep between steps; predictions leave the cores to whatever else the board does.
    spinning = training and threads != 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if exact:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if training:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        # A planned reuse holds a buffer from its first value's end to its next value's beginning, half a step later.
        options.enable_mem_reuse = False
    try:
        return ort.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            options,
            providers=list(providers),
            enable_fallback=0,  # else it prints about a damaged file on stdout, and tries it twice on the same provider
        )
    except Exception as error:
        where = str(model) if isinstance(model, Path) else "graph"
        raise ModelError(f"{where}: onnxruntime doesn't load it ({_first_line(error)})") from error


def onnxruntime_version() -> str:
    """Version of the installed onnxruntime. Raises `MissingExtraError` if it is not installed."""
    return str(_onnxruntime().__version__)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "onnxruntime is not installed", hint="On a Jetson it is JetPack's onnxruntime-gpu.", extra="board"
        ) from error
    except ImportError as error:
        raise RuntimeUnavailableError(f"onnxruntime can't be loaded ({_first_line(error)})") from error
    return onnxruntime


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
