"""A TensorRT for machines without one, generated from the census of the real bindings of a version.

It has the names and signatures of that version and no others: an unknown attribute, a wrong argument or a property that
can't be set is an error, as in the real one. Engines are the ONNX graph with its weights and compute in onnxruntime.
What is to go wrong is said in a file of settings beside the module, so that it goes wrong in child processes, too.
"""

from __future__ import annotations

# ruff: noqa: N802 - behaviours are called after what they are of
import ctypes
import json
import os
import re
import signal
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.runtime.session import Session
from support.paths import TESTS

CENSUS: dict[str, Any] = json.loads((TESTS / "support/fakes/tensorrt_census.json").read_text())
VERSIONS: list[str] = CENSUS["versions"]

_SIMPLE: dict[str, Any] = {"int": int, "str": str, "bool": bool, "tuple": tuple, "list": list, "Dims": (tuple, list)}
_SIMPLE["buffer"] = (bytes, bytearray, memoryview)


def members(kind: str, version: str) -> dict[str, str]:
    """What a class has in a version."""
    return {
        name: next(text for text, where in texts.items() if version in where)
        for name, texts in CENSUS["classes"].get(kind, {}).items()
        if any(version in where for where in texts.values())
    }


def parameters(overload: str) -> list[tuple[str, str, bool]]:
    """Names, types and whether they may be left out, of what an overload takes after `self`."""
    inside, depth, parts = (
        overload[1 : overload.rindex(")") if "->" not in overload else overload.rindex(") ->")],
        0,
        [""],
    )
    for c in inside:
        depth += (c in "[<(") - (c in "]>)")
        parts = [*parts, ""] if c == "," and depth == 0 else [*parts[:-1], parts[-1] + c]
    found = []
    for part in parts:
        name, _, kind = part.strip().partition(": ")
        kind, _, default = kind.partition(" = ")
        found.append((name, kind, bool(default)))
    return [p for p in found[1:] if p[0]]  # without self


class Double:
    """The module of a version.

    Args:
        version: The version; one of `VERSIONS`.
        folder: Where `settings.json` is read, and `calls.txt` written.
    """

    def __init__(self, version: str, folder: Path) -> None:
        self.version, self.folder = version, folder
        self.module = types.ModuleType("tensorrt")
        self.module.__version__ = version  # type: ignore[attr-defined]
        self.kinds: dict[str, Any] = {}
        for kind in CENSUS["classes"]:
            found = members(kind, version)
            if kind and found:
                self.kinds[kind] = self._kind(kind, found)
                setattr(self.module, kind, self.kinds[kind])

    def setting(self, name: str) -> Any:
        path = self.folder / "settings.json"
        return json.loads(path.read_text()).get(name) if path.exists() else None

    def note(self, text: str) -> None:
        with (self.folder / "calls.txt").open("a") as file:
            file.write(text + "\n")

    def make(self, kind: str, **state: Any) -> Any:
        """An object that only TensorRT makes."""
        found = object.__new__(self.kinds[kind])
        object.__setattr__(found, "state", types.SimpleNamespace(**state))
        return found

    def _kind(self, kind: str, found: dict[str, str]) -> Any:
        body: dict[str, Any] = {"__setattr__": self._set(kind, found), "__init__": self._start(kind, found)}
        for name, text in found.items():
            if text.startswith(("rw ", "ro ")):
                body[name] = self._property(kind, name)
            elif name != "__init__" and text != "constant":
                body[name] = self._method(kind, name, text)
        if kind == "IHostMemory":
            body["__bytes__"] = lambda own: own.state.raw
        made = type(kind, (), body)
        constants = [n for n, text in found.items() if text == "constant"]
        for number, name in enumerate(constants):
            constant = object.__new__(made)
            for key, value in (("name", name), ("value", number)):
                object.__setattr__(constant, f"_{key}", value)
            type.__setattr__(made, name, constant)
        if constants and "name" in found:
            type.__setattr__(made, "name", property(lambda own: own._name))
            type.__setattr__(made, "value", property(lambda own: own._value))
            type.__setattr__(made, "__int__", lambda own: own._value)
        return made

    def _property(self, kind: str, name: str) -> property:
        def get(own: Any) -> Any:
            self.note(f"{kind}.{name}")
            behaviour = getattr(_Behaviours, f"{kind}_{name}", None)
            return behaviour(self, own) if behaviour else own.state.__dict__[name]

        return property(get)

    def _set(self, kind: str, found: dict[str, str]) -> Any:
        def assign(own: Any, name: str, value: Any) -> None:
            text = found.get(name, "")
            if type(own) is self.kinds[kind] and name != "state":
                if not text.startswith("rw "):
                    raise AttributeError(f"{kind}.{name} can't be set in TensorRT {self.version}")
                self._check(f"{kind}.{name}", text[3:], value)
                self.note(f"{kind}.{name}")
                own.state.__dict__[name] = value
            else:
                object.__setattr__(own, name, value)

        return assign

    def _start(self, kind: str, found: dict[str, str]) -> Any:
        text = found.get("__init__", "")

        def start(own: Any, *arguments: Any, **named: Any) -> None:
            if not text.startswith("(self"):
                raise TypeError(f"{kind}: no constructor in TensorRT {self.version}")
            bound = self._bound(f"{kind}.__init__", text, arguments, named)
            object.__setattr__(own, "state", types.SimpleNamespace(**bound))
            behaviour = getattr(_Behaviours, f"{kind}_init", None)
            if behaviour:
                behaviour(self, own)

        return start

    def _method(self, kind: str, name: str, text: str) -> Any:
        def call(own: Any, *arguments: Any, **named: Any) -> Any:
            bound = self._bound(f"{kind}.{name}", text, arguments, named)
            self.note(f"{kind}.{name}")
            behaviour = getattr(_Behaviours, f"{kind}_{name}", None)
            if behaviour is None:
                raise NotImplementedError(f"{kind}.{name} is in TensorRT {self.version}, but not in the double")
            return behaviour(self, own, **bound)

        return call

    def _bound(self, where: str, text: str, arguments: Any, named: Any) -> dict[str, Any]:
        """Arguments by name, as the first overload takes them."""
        problems = []
        for overload in text.split(" | "):
            wanted = parameters(overload)
            try:
                if len(arguments) > len(wanted) or set(named) - {n for n, _, _ in wanted[len(arguments) :]}:
                    raise TypeError(f"{where}{overload}: got {arguments} {named}")
                bound = {**{n: v for (n, _, _), v in zip(wanted, arguments, strict=False)}, **named}
                for name, kind, optional in wanted:
                    if name in bound:
                        self._check(f"{where}({name})", kind, bound[name])
                    elif not optional:
                        raise TypeError(f"{where}{overload}: {name} is missing")
                return bound
            except TypeError as error:
                problems.append(str(error))
        raise TypeError("; ".join(problems))

    def _check(self, where: str, kind: str, value: Any) -> None:
        wanted = _SIMPLE.get(kind) or self.kinds.get(kind)
        if wanted is not None and not isinstance(value, wanted):
            raise TypeError(f"{where}: TensorRT {self.version} wants {kind}, got {type(value).__name__}")


def packed(header: dict[str, Any], graph: bytes, weights: bytes) -> bytes:
    header = {**header, "sizes": [len(graph), len(weights)]}
    return b"DOUBLE " + json.dumps(header).encode() + b"\n" + graph + weights


def unpacked(raw: bytes) -> tuple[dict[str, Any], bytes, bytes]:
    line, _, rest = bytes(raw).partition(b"\n")
    header = json.loads(line.removeprefix(b"DOUBLE "))
    size = header["sizes"][0]
    return header, rest[:size], rest[size:]


class _Behaviours:
    """What the double does, by class and member; `own.state` is what an object holds."""

    @staticmethod
    def ILogger_log(double: Double, own: Any, severity: Any, msg: str) -> None:
        raise NotImplementedError("a logger must override log")

    # Building

    @staticmethod
    def Builder_create_network(double: Double, own: Any, flags: int = 0) -> Any:
        return double.make("INetworkDefinition", flags=flags, inputs=[])

    @staticmethod
    def Builder_create_builder_config(double: Double, own: Any) -> Any:
        return double.make("IBuilderConfig", set={"TF32"}, pools={}, cache=None, profile=None)

    @staticmethod
    def Builder_create_optimization_profile(double: Double, own: Any) -> Any:
        return double.make("IOptimizationProfile", shapes={})

    @staticmethod
    def OnnxParser_parse_from_file(double: Double, own: Any, model: str) -> bool:
        path, network = Path(model), own.state.network
        own.state.errors = []
        try:
            session = Session(path)
        except ModelError as error:
            own.state.errors = [str(error)]
            return False
        network.state.graph = path.read_bytes()
        network.state.weights = (path.parent / beside(network.state.graph)).read_bytes()
        for name, (_, shape) in session.inputs.items():
            sizes = tuple(d if isinstance(d, int) else -1 for d in shape)
            network.state.inputs.append(double.make("ITensor", name=name, shape=sizes))
        return True

    @staticmethod
    def OnnxParser_num_errors(double: Double, own: Any) -> int:
        return len(own.state.errors)

    @staticmethod
    def OnnxParser_get_error(double: Double, own: Any, index: int) -> Any:
        return double.make("ParserError", text=own.state.errors[index])

    @staticmethod
    def ParserError_desc(double: Double, own: Any) -> str:
        return str(own.state.text)

    @staticmethod
    def INetworkDefinition_num_inputs(double: Double, own: Any) -> int:
        return len(own.state.inputs)

    @staticmethod
    def INetworkDefinition_get_input(double: Double, own: Any, index: int) -> Any:
        return own.state.inputs[index]

    @staticmethod
    def IBuilderConfig_set_memory_pool_limit(double: Double, own: Any, pool: Any, pool_size: int) -> None:
        own.state.pools[pool.name] = pool_size

    @staticmethod
    def IBuilderConfig_set_flag(double: Double, own: Any, flag: Any) -> None:
        own.state.set.add(flag.name)

    @staticmethod
    def IBuilderConfig_clear_flag(double: Double, own: Any, flag: Any) -> None:
        own.state.set.discard(flag.name)

    @staticmethod
    def IBuilderConfig_create_timing_cache(double: Double, own: Any, serialized_timing_cache: bytes) -> Any:
        fresh = {"version": double.version, "sm": os.environ["DOUBLE_SM"], "known": 0}
        return double.make("ITimingCache", body=json.loads(serialized_timing_cache or json.dumps(fresh)))

    @staticmethod
    def IBuilderConfig_set_timing_cache(double: Double, own: Any, cache: Any, ignore_mismatch: bool) -> bool:
        fits = (cache.state.body["version"], cache.state.body["sm"]) == (double.version, os.environ["DOUBLE_SM"])
        if fits or ignore_mismatch:
            own.state.cache = cache
        return bool(fits or ignore_mismatch)

    @staticmethod
    def IBuilderConfig_get_timing_cache(double: Double, own: Any) -> Any:
        return own.state.cache

    @staticmethod
    def ITimingCache_serialize(double: Double, own: Any) -> Any:
        return double.make("IHostMemory", raw=json.dumps(own.state.body).encode())

    @staticmethod
    def IOptimizationProfile_set_shape(double: Double, own: Any, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        own.state.shapes[input] = [list(min), list(opt), list(max)]
        double.note(f"shapes {own.state.shapes[input]}")

    @staticmethod
    def IBuilderConfig_add_optimization_profile(double: Double, own: Any, profile: Any) -> int:
        own.state.profile = profile
        return 0

    @staticmethod
    def Builder_build_serialized_network(double: Double, own: Any, network: Any, config: Any) -> Any:
        state, flags = config.state, sorted(config.state.set)
        monitor = state.__dict__.get("progress_monitor")
        if monitor is not None:
            monitor.phase_start("Building", None, 2)
            monitor.phase_start("Tactics", "Building", 1)
            monitor.step_complete("Tactics", 0)
            monitor.phase_finish("Tactics")
            monitor.step_complete("Building", 1)
            monitor.phase_finish("Building")
        known = state.cache.state.body["known"]
        double.note(f"built {' '.join(flags)} pool={state.pools} known={known} {network.state.flags}")
        if double.setting("sleep"):
            time.sleep(double.setting("sleep"))
        if double.setting("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if double.setting("out_of_memory"):
            own.state.logger.log(double.kinds["ILogger"].ERROR, "Requested amount of GPU memory could not be allocated")
            return None
        shapes = state.profile.state.shapes if state.profile is not None else {}
        if any(-1 in t.state.shape and t.state.name not in shapes for t in network.state.inputs):
            own.state.logger.log(double.kinds["ILogger"].ERROR, "a dynamic input has no optimization profile")
            return None
        state.cache.state.body["known"] += 1
        header = {"version": double.version, "sm": os.environ["DOUBLE_SM"], "shapes": shapes, "new": False}
        header |= {"refittable": "REFIT" in flags}
        return double.make("IHostMemory", raw=packed(header, network.state.graph, network.state.weights))

    # Loading and running

    @staticmethod
    def Runtime_deserialize_cuda_engine(double: Double, own: Any, serialized_engine: bytes) -> Any:
        if double.setting("load_kills"):
            os.kill(os.getpid(), signal.SIGSEGV)
        try:
            header, graph, weights = unpacked(serialized_engine)
            if (header["version"], header["sm"]) != (double.version, os.environ["DOUBLE_SM"]):
                raise ValueError("the engine is of another version or device")
            folder = Path(tempfile.mkdtemp(dir=double.folder))
            (folder / "graph.onnx").write_bytes(graph)
            (folder / beside(graph)).write_bytes(weights)
            session = Session(folder / "graph.onnx")
        except (ValueError, ModelError) as error:
            message = f"Serialization assertion failed: {error}"
            own.state.logger.log(double.kinds["ILogger"].ERROR, message)
            return None
        return double.make("ICudaEngine", header=header, graph=graph, weights=weights, session=session)

    @staticmethod
    def ICudaEngine_refittable(double: Double, own: Any) -> bool:
        return bool(own.state.header["refittable"])

    @staticmethod
    def ICudaEngine_num_io_tensors(double: Double, own: Any) -> int:
        return len(own.state.session.inputs) + len(own.state.session.outputs)

    @staticmethod
    def ICudaEngine_get_tensor_name(double: Double, own: Any, index: int) -> str:
        return [*own.state.session.inputs, *own.state.session.outputs][index]

    @staticmethod
    def ICudaEngine_get_tensor_mode(double: Double, own: Any, name: str) -> Any:
        modes = double.kinds["TensorIOMode"]
        return modes.INPUT if name in own.state.session.inputs else modes.OUTPUT

    @staticmethod
    def ICudaEngine_get_tensor_dtype(double: Double, own: Any, name: str) -> Any:
        ids = own.state.session.inputs.get(name, ("",))[0] == "tensor(int64)"
        kinds = double.kinds["DataType"]
        return kinds.FLOAT if not ids else getattr(kinds, "INT64", kinds.INT32)

    @staticmethod
    def ICudaEngine_get_tensor_shape(double: Double, own: Any, name: str) -> Any:
        return tuple(d if isinstance(d, int) else -1 for d in own.state.session.inputs[name][1])

    @staticmethod
    def ICudaEngine_get_tensor_profile_shape(double: Double, own: Any, name: str, profile_index: int) -> Any:
        return own.state.header["shapes"][name]

    @staticmethod
    def ICudaEngine_create_execution_context(double: Double, own: Any, **_: Any) -> Any:
        return double.make("IExecutionContext", engine=own, shapes={}, addresses={})

    @staticmethod
    def IExecutionContext_set_input_shape(double: Double, own: Any, name: str, shape: Any) -> bool:
        least, _, most = own.state.engine.state.header["shapes"].get(name, [list(shape)] * 3)
        fits = len(shape) == len(least) and all(a <= d <= b for a, d, b in zip(least, shape, most, strict=True))
        if fits:
            own.state.shapes[name] = tuple(shape)
        return fits

    @staticmethod
    def IExecutionContext_get_tensor_shape(double: Double, own: Any, name: str) -> Any:
        return tuple(_computed(own, {n: np.zeros(s, _dtype(own, n)) for n, s in own.state.shapes.items()})[name].shape)

    @staticmethod
    def IExecutionContext_set_tensor_address(double: Double, own: Any, name: str, memory: int) -> bool:
        own.state.addresses[name] = memory
        return memory != 0

    @staticmethod
    def IExecutionContext_execute_async_v3(double: Double, own: Any, stream_handle: int) -> bool:
        if double.setting("run_fails"):
            return False
        if double.setting("run_raises"):
            raise RuntimeError("Error Code 1: Cuda Runtime (an illegal memory access was encountered)")
        state, feeds = own.state, {}
        for name, shape in state.shapes.items():
            array = np.empty(shape, _dtype(own, name))
            ctypes.memmove(array.ctypes.data, state.addresses[name], array.nbytes)
            feeds[name] = array
        wrong = double.setting("wrong") or (double.setting("refitted_wrong") and state.engine.state.header["new"])
        wrong = wrong or (double.setting("refittable_wrong") and state.engine.state.header["refittable"])
        for name, value in _computed(own, feeds).items():
            value = np.ascontiguousarray(value + np.float32(0.5 if wrong else 0))
            ctypes.memmove(state.addresses[name], value.ctypes.data, value.nbytes)
        return True

    # New weights

    @staticmethod
    def Refitter_init(double: Double, own: Any) -> None:
        if double.setting("no_refitter"):
            raise TypeError("pybind11::init(): factory function returned nullptr")

    @staticmethod
    def Builder_init(double: Double, own: Any) -> None:
        if double.setting("no_builder"):
            raise TypeError("pybind11::init(): factory function returned nullptr")

    @staticmethod
    def Runtime_init(double: Double, own: Any) -> None:
        if double.setting("no_runtime"):
            raise TypeError("pybind11::init(): factory function returned nullptr")

    @staticmethod
    def OnnxParserRefitter_refit_from_file(double: Double, own: Any, model: str) -> bool:
        engine = own.state.refitter.state.engine
        own.state.errors = []
        if double.setting("refit_refused"):
            own.state.errors = ["refit: no such weights"]
            return False
        engine.state.new_weights = (Path(model).parent / beside(engine.state.graph)).read_bytes()
        return True

    @staticmethod
    def OnnxParserRefitter_num_errors(double: Double, own: Any) -> int:
        return len(own.state.errors)

    @staticmethod
    def OnnxParserRefitter_get_error(double: Double, own: Any, index: int) -> Any:
        return double.make("ParserError", text=own.state.errors[index])

    @staticmethod
    def Refitter_get_missing_weights(double: Double, own: Any) -> list[str]:
        return ["fc.bias"] if double.setting("missing") else []

    @staticmethod
    def Refitter_refit_cuda_engine(double: Double, own: Any) -> bool:
        double.note("refitted")
        own.state.engine.state.weights = own.state.engine.state.new_weights
        own.state.engine.state.header["new"] = True
        return True

    @staticmethod
    def ICudaEngine_create_serialization_config(double: Double, own: Any) -> Any:
        return double.make("ISerializationConfig", excluded=True)

    @staticmethod
    def ISerializationConfig_clear_flag(double: Double, own: Any, flag: Any) -> bool:
        own.state.excluded = own.state.excluded and flag.name != "EXCLUDE_WEIGHTS"
        return True

    @staticmethod
    def ICudaEngine_serialize_with_config(double: Double, own: Any, **config: Any) -> Any:
        (found,) = config.values()
        header = {**own.state.header, "refittable": False}
        weights = b"" if found.state.excluded else own.state.weights
        return double.make("IHostMemory", raw=packed(header, own.state.graph, weights))


def beside(graph: bytes) -> str:
    """The file that a graph's weights lie in."""
    found = re.search(rb"[a-z0-9]+\.safetensors", graph)
    return found[0].decode() if found else "weights.safetensors"


def _dtype(context: Any, name: str) -> Any:
    kind = context.state.engine.state.session.inputs[name][0]
    return np.int64 if kind == "tensor(int64)" else np.float32


def _computed(context: Any, feeds: dict[str, Any]) -> dict[str, Any]:
    return context.state.engine.state.session.run(feeds)  # type: ignore[no-any-return]


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
        f"from support.fakes.tensorrt import Double\n"
        f"sys.modules[__name__] = Double({version!r}, Path({str(folder)!r})).module\n"
    )


def calls(folder: Path) -> list[str]:
    """What was called, in order; `built ...` and `refitted` say more."""
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []
