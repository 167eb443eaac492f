"""The one place that opens onnxruntime sessions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.errors import MissingExtraError, ModelError, RuntimeUnavailableError

Array = npt.NDArray[Any]

# Wheels of onnxruntime report usage to their maker. Boards promise that nothing leaves them but weights, and
# their links are counted by the byte: it stays off, here and in child processes, unless somebody sets it otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class Session:
    """A loaded graph on the CPU.

    Memory patterns are off (batches and widths vary, and they cost memory without gaining time), threads don't spin
    (a board serves predictions beside training) and, for training graphs, optimisation is basic: it halves the load
    time at the same speed.

    Args:
        model: A file, or the bytes of one (then without external data).
        threads: Threads inside an operator; 0 takes one per core.
        training: Whether this is a training graph.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ModelError: onnxruntime doesn't accept the graph.
    """

    def __init__(self, model: Path | bytes, *, threads: int = 1, training: bool = False) -> None:
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False
        options.log_severity_level = 4  # what fails comes as an exception; the log would print it a second time
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if training:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            self._session = ort.InferenceSession(
                str(model) if isinstance(model, Path) else model,
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # else a damaged file is said on stdout and tried twice, on the same provider
            )
        except Exception as error:
            where = str(model) if isinstance(model, Path) else "graph"
            raise ModelError(f"{where}: onnxruntime doesn't load it ({_first_line(error)})") from error
        self.inputs: dict[str, tuple[str, tuple[int | str | None, ...]]] = {
            i.name: (i.type, tuple(i.shape)) for i in self._session.get_inputs()
        }
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.outputs: tuple[str, ...] = tuple(o.name for o in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the graph once.

        Args:
            feeds: Arrays by input name.
            outputs: Names of the wanted outputs; all by default.

        Raises:
            ModelError: Feeds don't fit the graph, or an operator fails on them.
        """
        names = list(outputs) if outputs is not None else list(self.outputs)
        try:
            values: list[Array] = self._session.run(names, dict(feeds))
        except Exception as error:
            raise ModelError(f"onnxruntime couldn't run the graph ({_first_line(error)})") from error
        return dict(zip(names, map(np.asarray, values), strict=True))


def version() -> str:
    """Version of the installed onnxruntime.

    Raises:
        MissingExtraError: It is not installed.
    """
    return str(_onnxruntime().__version__)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "onnxruntime is not installed",
            hint="pip install 'fedprune[board]' (on a Jetson: JetPack's onnxruntime-gpu).",
        ) from error
    except ImportError as error:
        raise RuntimeUnavailableError(f"onnxruntime can't be loaded ({_first_line(error)})") from error
    return onnxruntime


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
