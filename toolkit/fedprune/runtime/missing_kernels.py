"""Names the cause where onnxruntime has no CUDA, or no kernels for a GPU, which CUDA only says at the first of them.

PyPI's onnxruntime-gpu for aarch64 (1.29.0 and 1.31.1) has kernels for compute capability 8.9, 9.0, 12.0 and 12.1, and
no PTX that the driver could compile. On a Jetson Orin (8.7) or Thor (11.0) it installs, loads, and fails in a run.
"""

from __future__ import annotations

import ctypes

from fedprune.core.errors import ProfileError
from fedprune.planning.jetpack_releases import TEGRA_RELEASE, jetpack_of_release, l4t_release

# CUDA's own words for cudaErrorNoKernelImageForDevice (209), in each of the forms in which onnxruntime quotes them
# (https://github.com/microsoft/onnxruntime/issues/16263, https://github.com/microsoft/onnxruntime/issues/27725).
_CUDA_WORDS = "no kernel image is available"

# NVIDIA's indexes of wheels for Jetsons, by JetPack's major version
# (https://github.com/dusty-nv/jetson-containers/issues/1283, https://github.com/dusty-nv/jetson-containers/issues/1620).
_WHEEL_INDEXES = {"6": "https://pypi.jetson-ai-lab.io/jp6/cu126", "7": "https://pypi.jetson-ai-lab.io/sbsa/cu130"}

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h.
_MAJOR, _MINOR = 75, 76


def missing_kernels_reason(error: BaseException, version: str) -> str:
    """The cause and what to install, if `error` is one of onnxruntime `version` without kernels for this GPU; empty if
    it is another one."""
    if not any(_CUDA_WORDS in str(e) for e in (error, error.__cause__)):
        return ""
    capability = _compute_capability()
    gpu = f"compute capability {capability}" if capability else "this GPU"
    build = _suitable_build() or "an onnxruntime-gpu that was built for it"
    return f"onnxruntime {version} has no kernels for {gpu}: install {build} (docs/add-a-jetson.md)"


def missing_provider_reason(version: str) -> str:
    """The cause where onnxruntime `version` has no CUDA, on a Jetson with what to install."""
    build = _suitable_build()
    return f"onnxruntime {version} has no CUDA provider" + (
        f": install {build} (docs/add-a-jetson.md)" if build else ""
    )


def _suitable_build() -> str:
    """The build for this Jetson; empty on other machines, and for a JetPack without one."""
    try:
        release = l4t_release(TEGRA_RELEASE.read_text(errors="replace"))
        jetpack = jetpack_of_release(release) if release else None
    except (OSError, ProfileError):
        jetpack = None
    index = None if jetpack is None else _WHEEL_INDEXES.get(jetpack.name.partition(".")[0])
    if jetpack is None or index is None:
        return ""
    return f"NVIDIA's onnxruntime-gpu for JetPack {jetpack.name}, from {index}"


def _compute_capability() -> str:
    """The compute capability of the first GPU, such as "8.7"; empty if the driver doesn't say."""
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        codes = (
            driver.cuInit(0),
            driver.cuDeviceGet(ctypes.byref(device), 0),
            driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
            driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        )
    except (OSError, AttributeError):
        return ""
    return "" if any(codes) else f"{major.value}.{minor.value}"
