"""The child process that builds an engine and tries it: `python -m fedprune_device.engines`, with a request on stdin.

TensorRT's crashes, leaks and use of memory end only this process. The result is in the request's folder; the last line
of stdout has the outcome, the last line of stderr an error. It ends with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
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
from fedprune.model import step_contract
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_device.engines import bindings
from fedprune_device.engines.bindings import RejectedMessageLog
from fedprune_device.engines.build import build, refit
from fedprune_device.engines.build_process import BuildRequest
from fedprune_device.engines.engine import Engine
from fedprune_device.engines.engine_check import answers

_PR_SET_PDEATHSIG = 1
_TOLD_EVERY_S = 0.5
_RUNS = 11


def main() -> int:
    # Where memory runs out the kernel shall end this process, and not the board's agent.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.nice(10)
    try:
        print(json.dumps(_make(BuildRequest.from_json(sys.stdin.read()))))
    except FedpruneError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return int(error.exit_code)
    except MemoryError:
        print("not enough memory on this board", file=sys.stderr)
        return int(ExitCode.ENGINE)
    return int(ExitCode.OK)


def _end_with(parent: int) -> None:
    """End when the parent does, even by kill -9: the next agent would empty the work folder and build again."""
    # The kernel means the thread that started this process (prctl(2)): that one must live until an engine is made.
    with contextlib.suppress(AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise EngineError("the process that wanted an engine has ended")


def _make(order: BuildRequest) -> dict[str, Any]:
    _end_with(order.parent)
    found = bindings.find()
    plan, folder = EnginePlan.from_json(order.plan.encode()), order.folder
    graph = folder / plan.graph
    began = time.monotonic()
    complaints = RejectedMessageLog()
    with complaints.told("TensorRT failed"):
        if order.base is not None:
            made = refit(found, complaints, order.base.read_bytes(), graph)
        else:
            known = b"" if order.timings is None else order.timings.read_bytes()
            voice, refittable = _Voice(), order.refittable
            made, known = build(found, complaints, graph, plan, refittable=refittable, timings=known, tell=voice)
            atomic_file.write_whole(folder / "timing.cache", known, private=True)
    atomic_file.write_whole(folder / "engine.plan", made, private=True)
    seconds = time.monotonic() - began
    engine = Engine(found, made)
    x = np.load(folder / "x.npy", allow_pickle=False)
    file = io.BytesIO()
    np.save(file, answers(engine, x))
    atomic_file.write_whole(folder / "answers.npy", file.getvalue(), sync=False, private=True)
    return {"seconds": seconds, "latency_s": _latency(engine, x[:1])}


def _latency(engine: Engine, x: Any) -> float:
    times = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        engine.run({step_contract.X: x}, [step_contract.LOGITS])
        times.append(time.perf_counter() - began)
    return float(np.median(times))


class _Voice:
    """Reports progress now and then: a line for each of its thousands of steps would fill the disk."""

    def __init__(self) -> None:
        self._at = 0.0

    def __call__(self, text: str) -> None:
        if time.monotonic() >= self._at + _TOLD_EVERY_S:
            self._at = time.monotonic()
            print(" ".join(text.split())[:200], flush=True)


if __name__ == "__main__":
    sys.exit(main())
