"""Choose what answers predictions: an engine that is valid on this board and has passed its check, else onnxruntime."""

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
from fedprune.planning.profile import TIERS, HardwareProfile
from fedprune.runtime.bundle import BASE as FROZEN
from fedprune.runtime.precision_files import FLOAT32, PRECISIONS, graph_file, weights_file
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_device.engines import bindings
from fedprune_device.engines.bindings import Bindings
from fedprune_device.engines.build_process import BuildProcess, BuildRequest, BuildResult
from fedprune_device.engines.engine import Array, Engine
from fedprune_device.engines.engine_cache import BASE, ENGINE, TIMINGS, CachedEngine, EngineCache, EnginePlatform
from fedprune_device.engines.engine_check import WrongOutputError, answers, deviation, trial_inputs
from fedprune_device.hardware.readings import facts, power_mode
from fedprune_device.serving.model_slots import Serving
from fedprune_device.serving.predictor import WEIGHTS, Predictor

_LOG = logging.getLogger("fedprune.device")

# Consecutive failed builds after which the board stops trying on its own: each takes minutes of its GPU.
MOST_FAILURES = 2

# How an engine gets new weights: a refit of a refittable engine, a rebuild with cached timings, or a first build.
REFIT, REBUILD, BUILD = "refit", "rebuild", "build"


@dataclass(frozen=True)
class EngineRequest:
    """A model that needs an engine; `predictor` runs its float32 version on the CPU, as reference and as fallback."""

    predictor: Predictor
    folder: Path
    weights: str

    @classmethod
    def serving(cls, predictor: Predictor, folder: Path, record: Serving) -> EngineRequest:
        """The active model. Engines are compared with its float32 version, even if a lower precision serves."""
        return cls(Predictor(folder) if record.precision != FLOAT32 else predictor, folder, record.weights)


@dataclass(frozen=True)
class _Job:
    making: BuildProcess
    way: str
    refittable: bool
    key: str
    place: EnginePlatform
    warm: bool


class EngineSelector:
    """Keeps an engine for the model that serves. Errors of engines only change its `status`.

    `status` says what answers predictions, and why; `facts` are figures of the engine in use (how it was made, build
    time, deviation, latency); `error` is why there is no engine, once that is certain.
    """

    def __init__(
        self,
        root: Path,
        plan: EnginePlan,
        find: Callable[[], Bindings] = bindings.find,
        where: Callable[[Bindings], EnginePlatform] | None = None,
    ) -> None:
        self.cache, self.plan = EngineCache(root), plan
        self._find, self._where = find, where or here
        self._bindings: Bindings | None = None
        self._wanted: EngineRequest | None = None
        self._rebuild = False
        self._job: _Job | None = None
        self._lock = ExitStack()
        self._x = np.zeros(0)
        self._expected = np.zeros(0)
        self.status = "onnxruntime"
        self.facts: dict[str, Any] = {}
        self.error: FedpruneError | None = None

    @property
    def done(self) -> bool:
        return self._wanted is None

    @property
    def progress(self) -> str:
        return "" if self._job is None else self._job.making.progress

    def want(self, request: EngineRequest, *, rebuild: bool = False) -> None:
        """Request an engine for a model in place of the last request; `turn` does the rest.

        With `rebuild` an engine is made even if one exists, and regardless of earlier failures.
        """
        self.close()
        self._wanted, self._rebuild, self.error = request, rebuild, None
        self.status, self.facts = "onnxruntime (an engine is being made)", {}

    def turn(self) -> CheckedSession | None:
        """Advance without waiting for a child process; returns the session to use from now on, once an engine has
        passed its check.

        The caller waits for what this process must do itself: find CUDA and TensorRT, predict the samples of the check
        on the processor, load an engine and try it. For a large model that takes seconds.
        """
        request = self._wanted
        if request is None:
            return None
        try:
            session = self._go_on(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, onnxruntime continues answering
            failure = error if isinstance(error, FedpruneError) else EngineError(f"unexpected: {error!r}"[:300])
            self.close()
            self.status, self.error = f"onnxruntime ({failure})", failure
            _LOG.warning("no engine answers, but onnxruntime: %s", failure, exc_info=failure is not error)
            return None
        if session is not None:
            self.close()
            _LOG.info("%s answers predictions: %s", self.status, self._shown())
        return session

    def close(self) -> None:
        job, self._job, self._wanted = self._job, None, None
        if job is not None:
            job.making.stop()
            with suppress(FedpruneError):
                self._count(job.key, -1)  # an interrupted build is not a failed one
        self._lock.close()

    def fell_back(self, error: EngineError) -> None:
        self.status, self.facts = f"onnxruntime (the engine failed: {error})", {}
        _LOG.warning("onnxruntime answers, because the engine failed: %s", error)

    def _go_on(self, request: EngineRequest) -> CheckedSession | None:
        if self._bindings is None:
            self._bindings = self._find()
        if self._job is None:
            return self._begin(request, self._bindings)
        result = None
        try:
            result = self._job.making.poll()
            return None if result is None else self._take(request, self._bindings, self._job, result)
        except EngineError as error:
            self._failed(request, self._bindings, self._job, error, child_succeeded=result is not None)
            return None

    def _begin(self, request: EngineRequest, tensorrt: Bindings) -> CheckedSession | None:
        platform = self._where(tensorrt)
        graph = request.folder / self.plan.graph
        if not graph.is_file():
            raise EngineError(f"the plan's graph {self.plan.graph} isn't there")
        with storage_errors(f"can't read {graph}"):
            key = platform.key(file_digest(graph), self.plan.digest)
        self._x = trial_inputs(request.predictor.session.inputs, self.plan.batch[2])
        self._expected = answers(request.predictor.session, self._x)
        record = self.cache.record(key)
        if not self._rebuild:
            # After a restart the cached engine usually has the weights that serve.
            try:
                return self._load(request, tensorrt, key)
            except EngineError as error:
                _LOG.info("an engine is to be made: %s", error)
            if record.failures >= MOST_FAILURES:
                raise EngineError(
                    f"{record.failures} engines failed: {record.reason}",
                    hint="Try again: `fedprune-device build-engine --rebuild`.",
                )
        method = self._way(tensorrt, record, key)
        self._lock.enter_context(self.cache.making())
        self._start(
            request, tensorrt, key, platform, method, refittable=method == BUILD and self._refits(tensorrt, record)
        )
        return None

    def _refits(self, tensorrt: Bindings, record: CachedEngine) -> bool:
        return tensorrt.refits and self.plan.refit and record.refits

    def _way(self, tensorrt: Bindings, record: CachedEngine, key: str) -> str:
        """The way to give an engine new weights: each is tried once and measured, then the faster one is taken."""
        try:
            self.cache.read(BASE, key)
        except EngineError:
            return BUILD
        if not self._refits(tensorrt, record):
            return REBUILD
        if record.refit_s is None:
            return REFIT
        return REBUILD if record.rebuild_s is None or record.rebuild_s < record.refit_s else REFIT

    def _start(
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
            atomic_file.place(request.folder / name, work / name, sync=False)
        if (request.folder / FROZEN).is_file():
            atomic_file.place(request.folder / FROZEN, work / FROZEN, sync=False)
        with storage_errors(f"can't read {work / WEIGHTS}"):
            if file_digest(work / WEIGHTS) != request.weights:
                raise EngineError("the model was replaced meanwhile")
        buffer = io.BytesIO()
        np.save(buffer, self._x)
        atomic_file.write_whole(work / "x.npy", buffer.getvalue(), sync=False, private=True)
        timings = None
        try:
            cache.read(TIMINGS, platform.timings)
            timings = cache.path(TIMINGS)
        except EngineError:
            pass  # every layer is measured then
        base_engine = cache.path(BASE) if method == REFIT else None
        build_request = BuildRequest(work, self.plan.to_json(), refittable, timings, base_engine)
        process = BuildProcess(cache, build_request, self.plan.timeout_s)
        try:
            # A build counts as failed until it succeeds, so that one that crashes the board is not repeated for ever. A
            # build that can't even be started crashes nothing, and doesn't count.
            self._count(key, 1, "it was interrupted: out of memory, a crash or a power cut")
        except BaseException:
            process.stop()
            raise
        self._job = _Job(process, method, refittable, key, platform, timings is not None)
        _LOG.info("making an engine (%s) with %s", method, tensorrt.describe())

    def _take(self, request: EngineRequest, tensorrt: Bindings, job: _Job, result: BuildResult) -> CheckedSession:
        """Check what a child process made, put it into the cache and load it."""
        measured_deviation = deviation(result.answers, self._expected, self.plan.tolerance)
        cache, key = self.cache, job.key
        numbers = {
            "weights": request.weights,
            "way": job.way,
            "seconds": result.seconds,
            "deviation": measured_deviation,
        }
        numbers["latency_s"] = result.latency_s
        # Only a build measures layers; a refit keeps the formulation that its base engine was built with.
        if job.way != REFIT:
            cache.put(TIMINGS, cache.work / "timing.cache", job.place.timings, {})
        if job.refittable:
            cache.put(BASE, cache.work / "engine.plan", key, numbers)
        cache.put(ENGINE, cache.work / "engine.plan", key, numbers)
        # An engine that this process has no memory for is a failure, too, so nothing counts as done before it is
        # loaded.
        session = self._load(request, tensorrt, key)
        record = replace(cache.record(key), failures=0, reason="")
        if job.way == REFIT:
            record = replace(record, refit_s=result.seconds)
        # A rebuild without cached timings measures every layer again: its duration says nothing about the next one.
        elif job.way == REBUILD and job.warm:
            record = replace(record, rebuild_s=result.seconds)
        cache.keep(record)
        return session

    def _failed(
        self, request: EngineRequest, tensorrt: Bindings, job: _Job, error: EngineError, *, child_succeeded: bool
    ) -> None:
        """Build an engine that can't be refitted if a refittable or refitted one may be wrong; otherwise raise `error`.

        If the child's check has passed and only this process has no memory for the engine, the error is raised, too,
        because no other kind of engine would help.
        """
        self._job = None
        outputs_differ = isinstance(error, WrongOutputError)
        if (outputs_differ and job.refittable) or (job.way == REFIT and (outputs_differ or not child_succeeded)):
            _LOG.warning("refitting doesn't work on this board, building an engine without it: %s", error)
            self._count(job.key, -1)
            self.cache.keep(replace(self.cache.record(job.key), refits=False))
            self._start(request, tensorrt, job.key, job.place, REBUILD)
            return
        self._count(job.key, 0, str(error))
        raise error

    def _count(self, key: str, change: int, reason: str = "") -> None:
        record = self.cache.record(key)
        self.cache.keep(replace(record, failures=max(0, record.failures + change), reason=reason[:300]))

    def _load(self, request: EngineRequest, tensorrt: Bindings, key: str) -> CheckedSession:
        raw, numbers = self.cache.read(ENGINE, key)
        if numbers.get("weights") != request.weights:
            raise EngineError("the engine has other weights")
        with self.cache.loading(str(numbers["sha256"])):
            engine = Engine(tensorrt, raw)
            try:
                measured_deviation = deviation(answers(engine, self._x), self._expected, self.plan.tolerance)
            except EngineError:
                engine.close()
                raise
        self.facts = {**numbers, "deviation": measured_deviation}
        self.status = f"TensorRT {tensorrt.version}, {self.plan.precision}"
        return CheckedSession(engine, request.predictor, self)

    def _shown(self) -> str:
        f = self.facts
        speed = f"{1e3 * f['latency_s']:.3g} ms per sample"
        return f"{f['way']} in {f['seconds']:.1f} s, deviation {f['deviation']:.2g}, {speed}"


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
                self._selector.fell_back(error)
                self._engine = None  # after a CUDA error its outputs can't be trusted
        return self._predictor.session.run(feeds, outputs)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None


def here(tensorrt: Bindings) -> EnginePlatform:
    """The platform that engines built on this board now are valid for."""
    board_facts = facts()
    return EnginePlatform(board_facts.model[:200], board_facts.l4t, tensorrt.device.sm, tensorrt.version, power_mode())


ENGINES = "engines"  # the folder of engines in a state directory

CPU, _, TENSORRT = TIERS


@dataclass(frozen=True)
class Accelerator:
    """A board's execution tier (one of `TIERS`; the processor where the tier doesn't work), and the plan for its
    engines."""

    name: str
    plan: EnginePlan

    @property
    def cuda(self) -> bool:
        return self.name != CPU

    def selector(self, state: Path) -> EngineSelector | None:
        """The selector that keeps an engine for predictions; None unless the tier is TensorRT."""
        if self.name != TENSORRT:
            return None
        return EngineSelector(state / ENGINES, self.plan)


def accelerator_of(tier: str | None, plan: Path | None, profile: HardwareProfile | None) -> Accelerator:
    name = tier or (CPU if profile is None else profile.software.tier)
    return Accelerator(name, EnginePlan() if plan is None else read_plan(plan))


def read_plan(path: Path) -> EnginePlan:
    with storage_errors(f"can't read {path}"):
        raw = path.read_bytes()
    return EnginePlan.from_json(raw, str(path))
