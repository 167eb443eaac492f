"""Calls the few functions of CUDA's runtime library that engines need, by ctypes: JetPack has no package for them.

The numbers are those of cuda_runtime_api.h and driver_types.h, the same from CUDA 10 to 13
(https://docs.nvidia.com/cuda/cuda-runtime-api/).
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from fedprune.core.errors import EngineError

# Where CUDA's runtime library is looked for, newest first; the last place is where JetPack puts it.
LIBRARY_PATHS = (
    "libcudart.so.13",
    "libcudart.so.12",
    "libcudart.so.11.0",
    "libcudart.so",
    "/usr/local/cuda/lib64/libcudart.so",
)

# cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost
_TO_DEVICE, _FROM_DEVICE = 1, 2
# cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaDevAttrIntegrated
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18
# cudaErrorMemoryAllocation
_OUT_OF_MEMORY = 2

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)
_FUNCTIONS: dict[str, list[Any]] = {
    "cudaGetDeviceCount": [_NUMBER],
    "cudaDeviceGetAttribute": [_NUMBER, ctypes.c_int, ctypes.c_int],
    "cudaMemGetInfo": [ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)],
    "cudaMalloc": [ctypes.POINTER(_POINTER), ctypes.c_size_t],
    "cudaFree": [_POINTER],
    "cudaMemcpyAsync": [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_int, _POINTER],
    "cudaStreamCreate": [ctypes.POINTER(_POINTER)],
    "cudaStreamSynchronize": [_POINTER],
    "cudaStreamDestroy": [_POINTER],
}


@dataclass(frozen=True)
class Gpu:
    """A board's GPU: its compute capability, such as 8.7, and its memory in bytes."""

    sm: str
    shared_memory: bool
    memory_total: int


class Cuda:
    """CUDA's runtime library, loaded; raises `EngineError` without one."""

    def __init__(self) -> None:
        self._library = _load()
        for name, arguments in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        self._library.cudaGetErrorString.argtypes = [ctypes.c_int]
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def first_gpu(self) -> Gpu:
        """The first GPU, the only one of a Jetson; raises `EngineError` if none works."""
        count = ctypes.c_int()
        try:
            self.call("cudaGetDeviceCount", ctypes.byref(count))
        except EngineError as error:
            raise _unusable_gpu_error(error.what) from error
        if count.value < 1:
            raise _unusable_gpu_error("CUDA finds none")
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        sm = f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}"
        return Gpu(sm, bool(self._attribute(_INTEGRATED)), total.value)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; raises `EngineError` with CUDA's own words if it returns an error code."""
        code = getattr(self._library, name)(*arguments)
        if code:
            words = self._library.cudaGetErrorString(code) or b"unknown"
            hint = "Other processes share this memory: end some, or build smaller." if code == _OUT_OF_MEMORY else ""
            raise EngineError(f"{name} failed: {words.decode(errors='replace')} ({code})", hint=hint)

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self.call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
        return value.value


class Stream:
    """A stream of CUDA, and memory of the device that goes with it."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.handle = cuda, 0
        self._memory: dict[str, tuple[int, int]] = {}
        handle = ctypes.c_void_p()
        cuda.call("cudaStreamCreate", ctypes.byref(handle))
        self.handle = int(handle.value or 0)

    def buffer_address(self, name: str, size: int) -> int:
        """The address of the named buffer on the device, which is kept, and replaced by a larger one if needed."""
        address, capacity = self._memory.get(name, (0, 0))
        if capacity < max(size, 1):
            if address:
                # Before cudaFree: if that fails, `close` must not free it a second time.
                del self._memory[name]
                self._cuda.call("cudaFree", address)
            pointer = ctypes.c_void_p()
            self._cuda.call("cudaMalloc", ctypes.byref(pointer), max(size, 1))
            address = int(pointer.value or 0)
            self._memory[name] = address, max(size, 1)
        return address

    def copy_to_device(self, address: int, array: npt.NDArray[Any]) -> None:
        self._cuda.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, _TO_DEVICE, self.handle)

    def copy_from_device(self, array: npt.NDArray[Any], address: int) -> None:
        """Copy from the device into an array, which is filled when `wait` returns."""
        self._cuda.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, _FROM_DEVICE, self.handle)

    def wait(self) -> None:
        """Wait until all is done; raises `EngineError` if something failed."""
        self._cuda.call("cudaStreamSynchronize", self.handle)

    def __del__(self) -> None:  # no prediction uses it any more
        self.close()

    def close(self) -> None:
        addresses, handle = [address for address, _ in self._memory.values()], self.handle
        # Cleared first, since `close` may be called twice: by the owner, and when the object is collected.
        self._memory, self.handle = {}, 0
        with contextlib.suppress(EngineError):
            for address in addresses:
                self._cuda.call("cudaFree", address)
            if handle:
                self._cuda.call("cudaStreamDestroy", handle)


def _unusable_gpu_error(why: str) -> EngineError:
    return EngineError(
        f"no NVIDIA GPU can be used on this machine ({why})",
        hint="Engines are built on the Jetson that uses them, with its own driver and CUDA (docs/jetson.md).",
    )


def _load() -> Any:
    for name in LIBRARY_PATHS:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise EngineError(
        "there is no CUDA on this machine (no libcudart)",
        hint="TensorRT engines are for NVIDIA's boards: see docs/jetson.md.",
    )
