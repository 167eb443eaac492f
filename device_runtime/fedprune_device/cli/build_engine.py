"""`fedprune-device build-engine`: build and check the engine of the active model, or of a bundle."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from fedprune.core.cli import signals_as_interrupts
from fedprune.core.disk import file_digest, storage_errors
from fedprune.core.errors import EngineError, UsageError
from fedprune.runtime.bundle import files_folder, open_bundle
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_device.engines.board_tier import ENGINES, read_engine_plan
from fedprune_device.engines.engine_selector import EngineRequest, EngineSelector, current_platform
from fedprune_device.serving.model_slots import ModelSlots
from fedprune_device.serving.predictor import WEIGHTS, Predictor

_POLL_INTERVAL_S = 0.2  # a build takes minutes; the progress line is fluent enough at this pace


def build_engine(arguments: argparse.Namespace) -> None:
    from fedprune_device.engines import bindings

    # A board's engine has its own place in the state folder.
    if (arguments.bundle is None) != (arguments.out is None):
        raise UsageError("--out is for --bundle, and needed there")
    plan = None if arguments.plan is None else read_engine_plan(arguments.plan)
    if arguments.bundle is not None:
        plan = plan or open_bundle(arguments.bundle).engine or EnginePlan()
        folder, engines_folder = files_folder(arguments.bundle), arguments.out
        predictor = Predictor(folder)
        with storage_errors(f"can't read {folder}"):
            request = EngineRequest(predictor, folder, file_digest(folder / WEIGHTS))
    else:
        slots, engines_folder = ModelSlots(arguments.state / "serving"), arguments.state / ENGINES
        predictor, record = slots.open()
        request = EngineRequest.for_serving(predictor, slots.folder(record), record)
    tensorrt = bindings.find_tensorrt()
    board = current_platform(tensorrt)
    selector = EngineSelector(engines_folder, plan or EnginePlan(), lambda: tensorrt, lambda _: board)
    if not arguments.json:
        print(f"board: {board.board or 'unknown'}, sm {board.sm}, L4T {board.l4t or 'none'}")
        print(tensorrt.describe())
    with signals_as_interrupts():
        facts = make_engine(selector, request, rebuild=arguments.rebuild, shows_progress=sys.stderr.isatty())
    if arguments.json:
        print(json.dumps({"board": asdict(board), "status": selector.status, **facts}, sort_keys=True))
        return
    print(f"made: {facts['way']} in {facts['seconds']:.1f} s")
    print(f"check: deviation {facts['deviation']:.2g} from onnxruntime, {selector.plan.tolerance:g} allowed")
    print(f"one sample: {1e3 * facts['latency_s']:.3g} ms")
    print(f"engine: {selector.cache.root}")


def make_engine(
    selector: EngineSelector, request: EngineRequest, *, rebuild: bool = False, shows_progress: bool = False
) -> dict[str, Any]:
    """Build the engine of a model, wait for it, and return its facts (`EngineSelector.facts`).

    With `rebuild` it is built even if a good one exists; `shows_progress` reports it on stderr.
    """
    selector.request_engine(request, rebuild=rebuild)
    shown_progress = ""
    try:
        while (session := selector.turn()) is None and not selector.is_done:
            if shows_progress and selector.progress != shown_progress:
                shown_progress = selector.progress
                print(f"\r{shown_progress[:78]:78}", end="", file=sys.stderr, flush=True)
            time.sleep(_POLL_INTERVAL_S)
    finally:
        selector.close()
        if shown_progress:
            print(file=sys.stderr)
    if session is None:
        raise selector.error or EngineError("no engine was made")
    session.close()
    return selector.facts
