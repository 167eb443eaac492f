"""Chooses what answers predictions: an engine that is valid on this board and has passed its check, or onnxruntime."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core import atomic_file
from fedprune.core.disk import file_digest, storage_errors
from fedprune.core.errors import EngineError, FedpruneError
from fedprune.runtime.bundle import BASE as FROZEN
from fedprune.runtime.precision_files import FLOAT32, PRECISIONS, graph_file, weights_file
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_device.engines import bindings
from fedprune_device.engines.bindings import Bindings
from fedprune_device.engines.build_process import BuildProcess, BuildRequest, BuildResult
from fedprune_device.engines.engine import (
    Array,
    Engine,
    WrongOutputError,
    checked_deviation,
    trial_inputs,
    trial_outputs,
)
from fedprune_device.engines.engine_cache import BASE, ENGINE, TIMINGS, CachedEngine, EngineCache, EnginePlatform
from fedprune_device.hardware.readings import power_mode, read_board_facts
from fedprune_device.serving.model_slots import ServingRecord
from fedprune_device.serving.predictor import WEIGHTS, Predictor

_LOG = logging.getLogger("fedprune.device")

# Consecutive failed builds after which the board stops trying on its own: each takes minutes of its GPU.
MAX_FAILURES = 2

# How an engine gets new weights: a refit of a refittable engine, a rebuild with cached timings, or a first build.
REFIT, REBUILD, BUILD = "refit", "rebuild", "build"


@dataclass(frozen=True)
class EngineRequest:
    """A model that needs an engine; `predictor` runs its float32 version on the CPU, as reference and as fallback."""

    predictor: Predictor
    folder: Path
    weights: str

    @classmethod
    def for_serving(cls, predictor: Predictor, folder: Path, record: ServingRecord) -> EngineRequest:
        """The active model. Engines are compared with its float32 version, even if a lower precision serves."""
        return cls(Predictor(folder) if record.precision != FLOAT32 else predictor, folder, record.weights)


@dataclass(frozen=True)
class _BuildJob:
    """A running build: its process, the method (`REFIT`, `REBUILD` or `BUILD`), and what its result is valid for."""

    process: BuildProcess
    method: str
    refittable: bool
    key: str
    platform: EnginePlatform
    has_timings: bool


class EngineSelector:
    """Keeps an engine for the model that serves. Errors of engines only change its `status`.

    `status` says what answers predictions, and why; `facts` are figures of the engine in use (how it was made, build
    time, deviation, latency); `error` is why there is no engine, once that is certain.
    """

    def __init__(
        self,
        root: Path,
        plan: EnginePlan,
        find: Callable[[], Bindings] = bindings.find_tensorrt,
        platform_of: Callable[[Bindings], EnginePlatform] | None = None,
    ) -> None:
        self.cache, self.plan = EngineCache(root), plan
        self._find_tensorrt, self._platform_of = find, platform_of or current_platform
        self._bindings: Bindings | None = None
        self._request: EngineRequest | None = None
        self._rebuild = False
        self._job: _BuildJob | None = None
        self._build_lock = ExitStack()
        self._trial_inputs = np.zeros(0)
        self._expected_outputs = np.zeros(0)
        self.status = "onnxruntime"
        self.facts: dict[str, Any] = {}
        self.error: FedpruneError | None = None

    @property
    def is_done(self) -> bool:
        return self._request is None

    @property
    def progress(self) -> str:
        return "" if self._job is None else self._job.process.progress

    def request_engine(self, request: EngineRequest, *, rebuild: bool = False) -> None:
        """Request an engine for a model in place of the last request; `turn` does the rest.

        With `rebuild` an engine is made even if one exists, and regardless of earlier failures.
        """
        self.close()
        self._request, self._rebuild, self.error = request, rebuild, None
        self.status, self.facts = "onnxruntime (an engine is being made)", {}

    def turn(self) -> CheckedSession | None:
        """Advance by one step without waiting for a child process. Returns the session to use from now on, once an
        engine has passed its check. The caller waits for the steps of this process: to find CUDA and TensorRT, predict
        the samples of the check on the processor, load an engine and try it. For a large model they take seconds."""
        request = self._request
        if request is None:
            return None
        try:
            session = self._advance(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, onnxruntime continues answering
            failure = error if isinstance(error, FedpruneError) else EngineError(f"unexpected: {error!r}"[:300])
            self.close()
            self.status, self.error = f"onnxruntime ({failure})", failure
            _LOG.warning("no engine answers, but onnxruntime: %s", failure, exc_info=failure is not error)
            return None
        if session is not None:
            self.close()
            cost = "{way} in {seconds:.1f} s, deviation {deviation:.2g}".format(**self.facts)
            _LOG.info(
                "%s answers predictions: %s, %.3g ms per sample", self.status, cost, 1e3 * self.facts["latency_s"]
            )
        return session

    def close(self) -> None:
        job, self._job, self._request = self._job, None, None
        if job is not None:
            job.process.stop()
            with suppress(FedpruneError):
                self._count_failures(job.key, -1)  # an interrupted build is not a failed one
        self._build_lock.close()

    def on_engine_failure(self, error: EngineError) -> None:
        self.status, self.facts = f"onnxruntime (the engine failed: {error})", {}
        _LOG.warning("onnxruntime answers, because the engine failed: %s", error)

    def _advance(self, request: EngineRequest) -> CheckedSession | None:
        if self._bindings is None:
            self._bindings = self._find_tensorrt()
        if self._job is None:
            return self._begin_request(request, self._bindings)
        result = None
        try:
            result = self._job.process.poll()
            return None if result is None else self._accept(request, self._bindings, self._job, result)
        except EngineError as error:
            self._handle_failure(request, self._bindings, self._job, error, child_succeeded=result is not None)
            return None

    def _begin_request(self, request: EngineRequest, tensorrt: Bindings) -> CheckedSession | None:
        platform = self._platform_of(tensorrt)
        graph = request.folder / self.plan.graph
        if not graph.is_file():
            raise EngineError(f"the plan's graph {self.plan.graph} isn't there")
        with storage_errors(f"can't read {graph}"):
            key = platform.key(file_digest(graph), self.plan.digest)
        self._trial_inputs = trial_inputs(request.predictor.session.inputs, self.plan.batch[2])
        self._expected_outputs = trial_outputs(request.predictor.session, self._trial_inputs)
        record = self.cache.read_record(key)
        if not self._rebuild:
            # After a restart the cached engine usually has the weights that serve.
            try:
                return self._load(request, tensorrt, key)
            except EngineError as error:
                _LOG.info("an engine is to be made: %s", error)
            if record.failures >= MAX_FAILURES:
                raise EngineError(
                    f"{record.failures} engines failed: {record.reason}",
                    hint="Try again: `fedprune-device build-engine --rebuild`.",
                )
        method = self._build_method(tensorrt, record, key)
        self._build_lock.enter_context(self.cache.lock_for_build())
        refittable = method == BUILD and self._can_refit(tensorrt, record)
        self._start_build(request, tensorrt, key, platform, method, refittable=refittable)
        return None

    def _can_refit(self, tensorrt: Bindings, record: CachedEngine) -> bool:
        return tensorrt.can_refit and self.plan.refit and record.refits

    def _build_method(self, tensorrt: Bindings, record: CachedEngine, key: str) -> str:
        """The way to give an engine new weights: each is tried once and measured, then the faster one is taken."""
        try:
            self.cache.read(BASE, key)
        except EngineError:
            return BUILD
        if not self._can_refit(tensorrt, record):
            return REBUILD
        if record.refit_s is None:
            return REFIT
        return REBUILD if record.rebuild_s is None or record.rebuild_s < record.refit_s else REFIT

    def _start_build(
        self,
        request: EngineRequest,
        tensorrt: Bindings,
        key: str,
        platform: EnginePlatform,
        method: str,
        *,
        refittable: bool = False,
    ) -> None:
        cache, work = self.cache, self.cache.work
        lowered_weights = [weights_file(p) for p in PRECISIONS if graph_file(p) == self.plan.graph]
        # In a folder of the child's own, because the next round may replace the model while the child reads it.
        for name in (self.plan.graph, WEIGHTS, *lowered_weights):
            atomic_file.link_or_copy(request.folder / name, work / name, sync=False)
        if (request.folder / FROZEN).is_file():
            atomic_file.link_or_copy(request.folder / FROZEN, work / FROZEN, sync=False)
        with storage_errors(f"can't read {work / WEIGHTS}"):
            if file_digest(work / WEIGHTS) != request.weights:
                raise EngineError("the model was replaced meanwhile")
        buffer = io.BytesIO()
        np.save(buffer, self._trial_inputs)
        atomic_file.write_atomically(work / "x.npy", buffer.getvalue(), sync=False, private=True)
        timings = None
        try:
            cache.read(TIMINGS, platform.timings_key)
            timings = cache.path(TIMINGS)
        except EngineError:
            pass  # every layer is measured then
        base_engine = cache.path(BASE) if method == REFIT else None
        build_request = BuildRequest(work, self.plan.to_json(), refittable, timings, base_engine)
        process = BuildProcess(cache, build_request, self.plan.timeout_s)
        try:
            # A build counts as failed until it succeeds, so that one that crashes the board is not repeated for ever. A
            # build that can't even be started crashes nothing, and doesn't count.
            self._count_failures(key, 1, "it was interrupted: out of memory, a crash or a power cut")
        except BaseException:
            process.stop()
            raise
        self._job = _BuildJob(process, method, refittable, key, platform, timings is not None)
        _LOG.info("making an engine (%s) with %s", method, tensorrt.describe())

    def _accept(
        self, request: EngineRequest, tensorrt: Bindings, job: _BuildJob, result: BuildResult
    ) -> CheckedSession:
        """Check the engine that a child process made, put it into the cache and load it."""
        measured_deviation = checked_deviation(result.outputs, self._expected_outputs, self.plan.tolerance)
        cache, key = self.cache, job.key
        numbers = {
            "weights": request.weights,
            "way": job.method,
            "seconds": result.seconds,
            "deviation": measured_deviation,
            "latency_s": result.latency_s,
        }
        # Only a build measures layers; a refit keeps the formulation that its base engine was built with.
        if job.method != REFIT:
            cache.put(TIMINGS, cache.work / "timing.cache", job.platform.timings_key, {})
        if job.refittable:
            cache.put(BASE, cache.work / "engine.plan", key, numbers)
        cache.put(ENGINE, cache.work / "engine.plan", key, numbers)
        # An engine that this process has no memory for is a failure, too, so nothing counts as done before it is
        # loaded.
        session = self._load(request, tensorrt, key)
        record = replace(cache.read_record(key), failures=0, reason="")
        if job.method == REFIT:
            record = replace(record, refit_s=result.seconds)
        # A rebuild without cached timings measures every layer again: its duration says nothing about the next one.
        elif job.method == REBUILD and job.has_timings:
            record = replace(record, rebuild_s=result.seconds)
        cache.write_record(record)
        return session

    def _handle_failure(
        self, request: EngineRequest, tensorrt: Bindings, job: _BuildJob, error: EngineError, *, child_succeeded: bool
    ) -> None:
        """Build an engine that can't be refitted if a refittable or refitted one may be wrong; otherwise raise `error`.

        If the child's check has passed and only this process has no memory for the engine, the error is raised, too,
        because no other kind of engine would help.
        """
        self._job = None
        outputs_differ = isinstance(error, WrongOutputError)
        if (outputs_differ and job.refittable) or (job.method == REFIT and (outputs_differ or not child_succeeded)):
            _LOG.warning("refitting doesn't work on this board, building an engine without it: %s", error)
            self._count_failures(job.key, -1)
            self.cache.write_record(replace(self.cache.read_record(job.key), refits=False))
            self._start_build(request, tensorrt, job.key, job.platform, REBUILD)
            return
        self._count_failures(job.key, 0, str(error))
        raise error

    def _count_failures(self, key: str, change: int, reason: str = "") -> None:
        record = self.cache.read_record(key)
        self.cache.write_record(replace(record, failures=max(0, record.failures + change), reason=reason[:300]))

    def _load(self, request: EngineRequest, tensorrt: Bindings, key: str) -> CheckedSession:
        raw, numbers = self.cache.read(ENGINE, key)
        if numbers.get("weights") != request.weights:
            raise EngineError("the engine has other weights")
        with self.cache.mark_loading(str(numbers["sha256"])):
            engine = Engine(tensorrt, raw)
            try:
                outputs = trial_outputs(engine, self._trial_inputs)
                measured_deviation = checked_deviation(outputs, self._expected_outputs, self.plan.tolerance)
            except EngineError:
                engine.close()
                raise
        self.facts = {**numbers, "deviation": measured_deviation}
        self.status = f"TensorRT {tensorrt.version}, {self.plan.precision}"
        return CheckedSession(engine, request.predictor, self)


class CheckedSession:
    """A session of an engine that has passed its check, with onnxruntime as the fallback."""

    def __init__(self, engine: Engine, predictor: Predictor, selector: EngineSelector) -> None:
        self.inputs, self.outputs = predictor.session.inputs, predictor.session.outputs
        self._engine: Engine | None = engine
        self._predictor, self._selector = predictor, selector

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        if self._engine is not None:
            try:
                return self._engine.run(feeds, outputs)
            except EngineError as error:
                self._selector.on_engine_failure(error)
                self._engine = None  # after a CUDA error its outputs can't be trusted
        return self._predictor.session.run(feeds, outputs)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None


def current_platform(tensorrt: Bindings) -> EnginePlatform:
    """The platform that engines built on this board now are valid for."""
    board_facts = read_board_facts()
    return EnginePlatform(board_facts.model[:200], board_facts.l4t, tensorrt.device.sm, tensorrt.version, power_mode())
