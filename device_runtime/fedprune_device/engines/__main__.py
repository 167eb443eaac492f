"""The child process that builds an engine and tests it: `python -m fedprune_device.engines`, with a request on stdin.

TensorRT's crashes, leaks and use of memory end only this process. It reads graph, weights and `x.npy` from the
request's folder, and writes `engine.plan`, `answers.npy` (the engine's outputs for `x.npy`) and, after a build,
`timing.cache` to it. The last line of stdout has the duration and the engine's latency as JSON, the last line of stderr
an error. The process ends with its parent.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core import atomic_file
from fedprune.core.errors import EngineError, ExitCode, FedpruneError
from fedprune.core.median import median
from fedprune.core.parent_death import set_parent_death_signal
from fedprune.model import step_contract
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_device.engines import bindings
from fedprune_device.engines.bindings import TensorRTErrors
from fedprune_device.engines.build import build_from_graph, refit_from_graph
from fedprune_device.engines.build_process import BuildRequest
from fedprune_device.engines.engine import Engine, trial_outputs

_PROGRESS_INTERVAL_S = 0.5
_TIMED_RUNS = 11  # an odd number of timed predictions, whose median ignores the first, which allocates memory


def main() -> int:
    # If memory runs out, the OOM killer should end this process, not the board's agent.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.nice(10)  # predictions, which run in another process meanwhile, have priority
    try:
        print(json.dumps(_build_and_test(BuildRequest.from_json(sys.stdin.read()))))
    except FedpruneError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return int(error.exit_code)
    except MemoryError:
        print("not enough memory on this board", file=sys.stderr)
        return int(ExitCode.ENGINE)
    return int(ExitCode.OK)


def _build_and_test(request: BuildRequest) -> dict[str, Any]:
    # End this process with its parent: otherwise it would write to a folder that the next agent empties.
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != request.parent:  # it ended before the kernel was asked
        raise EngineError("the process that requested an engine has ended")
    tensorrt = bindings.find_tensorrt()
    plan, folder = EnginePlan.from_json(request.plan.encode()), request.folder
    graph = folder / plan.graph
    began = time.monotonic()
    errors = TensorRTErrors()
    with errors.translate("TensorRT failed"):
        if request.base is not None:
            engine_bytes = refit_from_graph(tensorrt, errors, request.base.read_bytes(), graph)
        else:
            timings = b"" if request.timings is None else request.timings.read_bytes()
            progress, refittable = _ThrottledProgress(), request.refittable
            engine_bytes, timings = build_from_graph(
                tensorrt, errors, graph, plan, refittable=refittable, timings=timings, report=progress
            )
            atomic_file.write_atomically(folder / "timing.cache", timings, private=True)
    atomic_file.write_atomically(folder / "engine.plan", engine_bytes, private=True)
    seconds = time.monotonic() - began
    engine = Engine(tensorrt, engine_bytes)
    x = np.load(folder / "x.npy", allow_pickle=False)
    buffer = io.BytesIO()
    np.save(buffer, trial_outputs(engine, x))
    atomic_file.write_atomically(folder / "answers.npy", buffer.getvalue(), sync=False, private=True)
    times = []
    for _ in range(_TIMED_RUNS):
        began = time.perf_counter()
        engine.run({step_contract.X: x[:1]}, [step_contract.LOGITS])
        times.append(time.perf_counter() - began)
    return {"seconds": seconds, "latency_s": median(times)}


class _ThrottledProgress:
    """Print progress at most twice a second: TensorRT reports thousands of steps, which would fill the disk."""

    def __init__(self) -> None:
        self._at = 0.0

    def __call__(self, text: str) -> None:
        if time.monotonic() >= self._at + _PROGRESS_INTERVAL_S:
            self._at = time.monotonic()
            print(" ".join(text.split())[:200], flush=True)


if __name__ == "__main__":
    sys.exit(main())
