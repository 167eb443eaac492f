"""A TensorRT for machines without one: what the board asks of it, as the versions that boards have differ.

Engines are the ONNX graph with its weights and compute in onnxruntime. What is to go wrong is said in a file of
settings beside the module, so that it goes wrong in child processes, too.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import tempfile
import time
import types
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.runtime.session import OnnxSession
from support.paths import TESTS

VERSIONS = ("8.6.1", "10.3.0", "10.16.1", "11.3.0", "11.4.0")
"""The oldest that is taken, JetPack 6's, the newest 10, one that computes something else in engines that can take new
weights, and the newest."""


def tensorrt_module(version: str, folder: Path) -> types.ModuleType:
    """The module of one of `VERSIONS`; the real bindings of each have these names and no others of those in use.

    In the folder `settings.json` is read, and `calls.txt` written.
    """
    major = int(version.split(".")[0])

    def setting(name: str) -> Any:
        path = folder / "settings.json"
        return json.loads(path.read_text()).get(name) if path.exists() else None

    def note(text: str) -> None:
        with (folder / "calls.txt").open("a") as file:
            file.write(text + "\n")

    def refuse(name: str) -> None:
        if setting(name):
            raise TypeError("pybind11::init(): factory function returned nullptr")

    precisions = ["FP16"] if major < 11 else []
    creation = (["EXPLICIT_BATCH"] if major < 11 else []) + (["STRONGLY_TYPED"] if major >= 10 else [])
    BuilderFlag: Any = _constants("BuilderFlag", "REFIT", "TF32", *precisions)
    DataType: Any = _constants("DataType", "FLOAT", "HALF", "INT32", *(["INT64"] if major >= 10 else []))
    NetworkDefinitionCreationFlag: Any = _constants("NetworkDefinitionCreationFlag", *creation)
    MemoryPoolType: Any = _constants("MemoryPoolType", "WORKSPACE")
    TensorIOMode: Any = _constants("TensorIOMode", "INPUT", "OUTPUT")
    SerializationFlag: Any = _constants("SerializationFlag", "EXCLUDE_WEIGHTS")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

        def log(self, severity: int, msg: str) -> None:
            raise NotImplementedError

    class IProgressMonitor:
        pass

    class IHostMemory:
        def __init__(self, raw: bytes) -> None:
            self._raw = raw

        def __bytes__(self) -> bytes:
            return self._raw

    class ITimingCache:
        def __init__(self, body: dict[str, Any]) -> None:
            self.body = body

        def serialize(self) -> IHostMemory:
            return IHostMemory(json.dumps(self.body).encode())

    class IOptimizationProfile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
            self.shapes[input] = [list(min), list(opt), list(max)]
            note(f"shapes {self.shapes[input]}")

    class IBuilderConfig:
        __slots__ = ("_cache", "_flags", "_pools", "_shapes", "builder_optimization_level")

        def __init__(self) -> None:
            self._flags, self._pools = {BuilderFlag.TF32}, dict[str, int]()
            self._shapes: dict[str, Any] = {}

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._pools[MemoryPoolType(pool).name] = pool_size

        def set_flag(self, flag: Any) -> None:
            self._flags.add(BuilderFlag(flag))

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(BuilderFlag(flag))

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
            fresh = {"version": version, "sm": os.environ["DOUBLE_SM"], "known": 0}
            return ITimingCache(json.loads(serialized_timing_cache or json.dumps(fresh)))

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            fits = (cache.body["version"], cache.body["sm"]) == (version, os.environ["DOUBLE_SM"])
            if fits or ignore_mismatch:
                self._cache = cache
            return fits or ignore_mismatch

        def get_timing_cache(self) -> ITimingCache:
            return self._cache

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            self._shapes = profile.shapes
            return 0

    class MonitoredConfig(IBuilderConfig):
        __slots__ = ("progress_monitor",)

    class Network:
        def __init__(self, flags: int) -> None:
            self.flags, self.inputs = flags, list[Any]()

        @property
        def num_inputs(self) -> int:
            return len(self.inputs)

        def get_input(self, index: int) -> Any:
            return self.inputs[index]

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            refuse("no_builder")
            self._logger = logger

        def create_network(self, flags: int = 0) -> Network:
            return Network(flags)

        def create_builder_config(self) -> IBuilderConfig:
            return config_class()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> IHostMemory | None:
            monitor = getattr(config, "progress_monitor", None)
            if monitor is not None:
                monitor.phase_start("Building", None, 2)
                monitor.phase_start("Tactics", "Building", 1)
                monitor.step_complete("Tactics", 0)
                monitor.phase_finish("Tactics")
                monitor.step_complete("Building", 1)
                monitor.phase_finish("Building")
            cache, flags = config.get_timing_cache().body, sorted(flag.name for flag in config._flags)
            note(f"built {' '.join(flags)} pool={config._pools} known={cache['known']} {network.flags}")
            time.sleep(setting("sleep") or 0)
            if setting("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            free = any(-1 in t.shape and t.name not in config._shapes for t in network.inputs)
            if free or setting("out_of_memory"):
                reason = "a dynamic input has no optimization profile" if free else "memory could not be allocated"
                self._logger.log(ILogger.ERROR, reason)
                return None
            cache["known"] += 1
            header = {"version": version, "sm": os.environ["DOUBLE_SM"], "shapes": config._shapes, "new": False}
            return IHostMemory(pack_engine(header | {"refittable": "REFIT" in flags}, network.graph, network.weights))

    class ErrorList:
        def __init__(self) -> None:
            self._errors: list[str] = []

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> Any:
            return types.SimpleNamespace(desc=lambda: self._errors[index])

    class OnnxParser(ErrorList):
        def __init__(self, network: Network, logger: ILogger) -> None:
            super().__init__()
            self._network: Any = network

        def parse_from_file(self, model: str) -> bool:
            path = Path(model)
            try:
                session = OnnxSession(path)
            except ModelError as error:
                self._errors = [str(error)]
                return False
            self._network.graph = path.read_bytes()
            self._network.weights = (path.parent / weights_name(self._network.graph)).read_bytes()
            for name, (_, shape) in session.inputs.items():
                sizes = tuple(d if isinstance(d, int) else -1 for d in shape)
                self._network.inputs.append(types.SimpleNamespace(name=name, shape=sizes))
            return True

    class ICudaEngine:
        def __init__(self, raw: bytes) -> None:
            line, _, rest = bytes(raw).partition(b"\n")
            self.header = json.loads(line.removeprefix(b"DOUBLE "))
            size = self.header["sizes"][0]
            self.graph, self.weights = rest[:size], rest[size:]
            if (self.header["version"], self.header["sm"]) != (version, os.environ["DOUBLE_SM"]):
                raise ValueError("the engine is of another version or device")
            place = Path(tempfile.mkdtemp(dir=folder))
            (place / "graph.onnx").write_bytes(self.graph)
            (place / weights_name(self.graph)).write_bytes(self.weights)
            self.session = OnnxSession(place / "graph.onnx")
            self.refittable = bool(self.header["refittable"])
            self._names = [*self.session.inputs, *self.session.outputs]
            self.num_io_tensors = len(self._names)

        def get_tensor_name(self, index: int) -> str:
            return self._names[index]

        def get_tensor_mode(self, name: str) -> Any:
            return TensorIOMode["INPUT" if name in self.session.inputs else "OUTPUT"]

        def get_tensor_dtype(self, name: str) -> Any:
            is_integer = self.session.inputs.get(name, ("",))[0] == "tensor(int64)"
            return DataType["FLOAT" if not is_integer else "INT64" if major >= 10 else "INT32"]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(d if isinstance(d, int) else -1 for d in self.session.inputs[name][1])

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
            return self.header["shapes"][name]

        def create_execution_context(self) -> IExecutionContext:
            return IExecutionContext(self)

        def create_serialization_config(self) -> Any:
            excluded = {SerializationFlag.EXCLUDE_WEIGHTS}
            return types.SimpleNamespace(excluded=excluded, clear_flag=excluded.discard)

        def serialize_with_config(self, config: Any) -> IHostMemory:
            return IHostMemory(
                pack_engine({**self.header, "refittable": False}, self.graph, b"" if config.excluded else self.weights)
            )

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine, self._arrays, self._addresses = engine, dict[str, Any](), dict[str, int]()

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            smallest, _, largest = self._engine.header["shapes"].get(name, [list(shape)] * 3)
            fits = len(shape) == len(smallest) and all(
                a <= d <= b for a, d, b in zip(smallest, shape, largest, strict=True)
            )
            if fits:
                is_integer = self._engine.session.inputs[name][0] == "tensor(int64)"
                self._arrays[name] = np.zeros(shape, np.int64 if is_integer else np.float32)
            return fits

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self._engine.session.run(self._arrays)[name].shape

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return memory != 0

        def execute_async_v3(self, stream_handle: int) -> bool:
            note("executed")
            if setting("run_fails"):
                return False
            if setting("run_raises"):
                raise RuntimeError("Error Code 1: Cuda Runtime (an illegal memory access was encountered)")
            for name, array in self._arrays.items():
                ctypes.memmove(array.ctypes.data, self._addresses[name], array.nbytes)
            header = self._engine.header
            wrong = setting("wrong") or (setting("refitted_wrong") and header["new"])
            wrong = wrong or (setting("refittable_wrong") and header["refittable"])
            for name, value in self._engine.session.run(self._arrays).items():
                value = np.ascontiguousarray(value + np.float32(0.5 if wrong else 0))
                ctypes.memmove(self._addresses[name], value.ctypes.data, value.nbytes)
            return True

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            refuse("no_runtime")
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            if setting("load_kills"):
                os.kill(os.getpid(), signal.SIGSEGV)
            try:
                return ICudaEngine(serialized_engine)
            except (ValueError, ModelError) as error:
                reason = f"Serialization assertion failed: {error}"
                self._logger.log(ILogger.ERROR, reason)
                return None

    class Refitter:
        def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
            refuse("no_refitter")
            self.engine = engine
            self.weights = b""

        def get_missing_weights(self) -> list[str]:
            return ["fc.bias"] if setting("missing") else []

        def refit_cuda_engine(self) -> bool:
            note("refitted")
            self.engine.weights = self.weights
            self.engine.header["new"] = True
            return True

    class OnnxParserRefitter(ErrorList):
        def __init__(self, refitter: Refitter, logger: ILogger) -> None:
            super().__init__()
            self._refitter = refitter

        def refit_from_file(self, model: str) -> bool:
            note("refit from a file")
            if setting("refit_refused"):
                self._errors = ["refit: no such weights"]
                return False
            self._refitter.weights = (Path(model).parent / weights_name(self._refitter.engine.graph)).read_bytes()
            return True

    config_class = MonitoredConfig if major >= 10 else IBuilderConfig
    module: Any = types.ModuleType("tensorrt")
    module.__version__ = version
    module.IBuilderConfig = config_class
    for each in (
        BuilderFlag, DataType, NetworkDefinitionCreationFlag, MemoryPoolType, TensorIOMode, ILogger, Builder,
        OnnxParser, IExecutionContext, Runtime, Refitter,
    ):  # fmt: skip
        setattr(module, each.__name__, each)
    for later in (SerializationFlag, IProgressMonitor, OnnxParserRefitter) if major >= 10 else ():
        setattr(module, later.__name__, later)
    return module  # type: ignore[no-any-return]


def _constants(name: str, *names: str) -> Any:
    return IntEnum(name, {constant: number for number, constant in enumerate(names)})


def pack_engine(header: dict[str, Any], graph: bytes, weights: bytes) -> bytes:
    header = {**header, "sizes": [len(graph), len(weights)]}
    return b"DOUBLE " + json.dumps(header).encode() + b"\n" + graph + weights


def weights_name(graph: bytes) -> str:
    """The file that a graph's weights lie in."""
    match = re.search(rb"[a-z0-9]+\.safetensors", graph)
    return match[0].decode() if match else "weights.safetensors"


LIBRARY = r"""
#include <stdlib.h>
#include <string.h>
static long number(const char *name, long otherwise) { char *t = getenv(name); return t ? atol(t) : otherwise; }
int cudaGetDeviceCount(int *n) { *n = number("DOUBLE_DEVICES", 1); return *n < 0 ? 35 : 0; }
int cudaDeviceGetAttribute(int *v, int a, int d) { char *s = getenv("DOUBLE_SM");
  *v = a == 75 ? atoi(s) : a == 76 ? atoi(strchr(s, '.') + 1) : a == 18 ? 1 : -1; return *v < 0; }
int cudaMemGetInfo(size_t *f, size_t *t) { *f = 1L << 31; *t = 1L << 32; return 0; }
int cudaMalloc(void **p, size_t n) {
  if ((long)n > number("DOUBLE_MEMORY", 1L << 40)) return 2; *p = malloc(n); return 0; }
int cudaFree(void *p) { free(p); return 0; }
static struct { void *a; const void *b; size_t n; } later[64];
static int waiting;
int cudaMemcpyAsync(void *a, const void *b, size_t n, int k, void *s) {
  if (!s || (k != 1 && k != 2) || waiting == 64) return 1;
  if (k == 1) { memcpy(a, b, n); return 0; }
  later[waiting].a = a; later[waiting].b = b; later[waiting++].n = n; return 0; }
int cudaStreamCreate(void **s) { *s = malloc(1); return 0; }
int cudaStreamSynchronize(void *s) {
  for (int i = 0; i < waiting; i++) memcpy(later[i].a, later[i].b, later[i].n);
  waiting = 0; return s ? 0 : 1; }
int cudaStreamDestroy(void *s) { free(s); return 0; }
const char *cudaGetErrorString(int c) {
  return c == 2 ? "out of memory" : c == 35 ? "driver too old" : "invalid value"; }
"""
"""CUDA's runtime library on a machine without CUDA: its memory is this machine's."""


def install(folder: Path, version: str) -> None:
    """Write the module `tensorrt` of a version into a folder."""
    here = str(TESTS)
    (folder / "tensorrt.py").write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {here!r})\n"
        f"from support.fakes.tensorrt import tensorrt_module\n"
        f"sys.modules[__name__] = tensorrt_module({version!r}, Path({str(folder)!r}))\n"
    )


def calls(folder: Path) -> list[str]:
    """Builds, refits and runs, in order."""
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []
