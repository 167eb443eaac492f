"""Builds an engine from an ONNX graph and its weights, or gives a built one new weights; runs in a child process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedprune.core.errors import EngineError
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_device.engines.bindings import Bindings, TensorRTErrors

ReportProgress = Callable[[str], None]  # takes a few words on how far a build is


def build_from_graph(
    bindings: Bindings,
    errors: TensorRTErrors,
    graph: Path,
    plan: EnginePlan,
    *,
    refittable: bool,
    timings: bytes,
    report: ReportProgress,
) -> tuple[bytes, bytes]:
    """Build an engine; returns it and the timing cache.

    The graph's weights are external data in its folder. A `refittable` engine takes new weights later. `timings` is the
    timing cache of an earlier build with this TensorRT, or empty. Raises `EngineError`.
    """
    trt = bindings.trt
    logger = errors.logger(trt)
    builder = trt.Builder(logger)
    creation_flags = trt.NetworkDefinitionCreationFlag
    flag = creation_flags.STRONGLY_TYPED if bindings.strongly_typed else creation_flags.EXPLICIT_BATCH
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise _parser_error(parser, errors, "TensorRT doesn't take the graph")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.pool_bytes)
    if hasattr(trt.IBuilderConfig, "builder_optimization_level"):  # from TensorRT 8.6 on
        config.builder_optimization_level = plan.level
    if plan.precision == "float32":
        config.clear_flag(trt.BuilderFlag.TF32)  # which is on by default
    if plan.precision == "float16" and not bindings.strongly_typed:
        config.set_flag(trt.BuilderFlag.FP16)
    if refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    cache = config.create_timing_cache(timings)
    # A cache of another device is refused (`ignore_mismatch` is False): its timings would be wrong here.
    if timings and not config.set_timing_cache(cache, False):
        timings = b""
        cache = config.create_timing_cache(timings)
    if not timings:
        config.set_timing_cache(cache, False)
    _set_batches(builder, network, config, plan)
    if hasattr(trt, "IProgressMonitor") and hasattr(trt.IBuilderConfig, "progress_monitor"):
        monitor = _monitor(trt, report)
        config.progress_monitor = monitor
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise errors.error("TensorRT can't build the engine")
    return bytes(built), bytes(config.get_timing_cache().serialize())


def refit_from_graph(bindings: Bindings, errors: TensorRTErrors, base: bytes, graph: Path) -> bytes:
    """Give an engine that was built to take new weights those next to a graph; raises `EngineError`."""
    trt = bindings.trt
    logger = errors.logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(base)
    if engine is None or not engine.refittable:
        raise errors.error("the engine takes no new weights")
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(graph)):
        raise _parser_error(parser, errors, "TensorRT doesn't take the new weights")
    missing = refitter.get_missing_weights()
    if missing:
        raise EngineError(f"new weights lack {len(missing)} that the engine wants", got=str(missing[0])[:100])
    if not refitter.refit_cuda_engine():
        raise errors.error("TensorRT can't put the new weights into the engine")
    config = engine.create_serialization_config()
    # A serialised engine may lack its weights, and the one that serves must have them.
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    return bytes(engine.serialize_with_config(config))


def _set_batches(builder: Any, network: Any, config: Any, plan: EnginePlan) -> None:
    """Declare the batch sizes: the first dimension of every input that is free."""
    profile, has_free_batch = builder.create_optimization_profile(), False
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        first, *rest = tuple(tensor.shape)
        if any(d < 0 for d in rest):
            raise EngineError(
                f"input {tensor.name} has free dimensions other than the batch",
                expected="fixed ones",
                got=[first, *rest],
            )
        if first < 0:
            profile.set_shape(tensor.name, *((n, *rest) for n in plan.batch))
            has_free_batch = True
    if has_free_batch and config.add_optimization_profile(profile) < 0:
        raise EngineError(f"TensorRT refuses batches of {plan.batch[0]} to {plan.batch[2]} samples")


def _monitor(trt: Any, report: ReportProgress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            # Nested phases are left out: the outer ones tell how far a build is.
            if parent_phase is None:
                self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                report(f"{phase_name}: {step} of {self._steps[phase_name]}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _parser_error(parser: Any, errors: TensorRTErrors, message: str) -> EngineError:
    for i in range(parser.num_errors):
        errors.add(str(parser.get_error(i).desc()))
    return errors.error(message)
