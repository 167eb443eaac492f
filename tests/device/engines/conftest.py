"""A board with TensorRT and CUDA, both doubles, in this process and in its children."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprune_device.engines import cuda
from support.fakes import tensorrt as tensorrt_double
from support.fakes.engine_board import EngineBoard


@pytest.fixture(scope="session")
def cuda_double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CUDA's runtime library, or what stands in for it."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: no double of CUDA")
    folder = tmp_path_factory.mktemp("cuda")
    source = folder / "cudart.c"
    source.write_text(tensorrt_double.LIBRARY)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libcudart.so.13", source], check=True)
    return folder


@pytest.fixture
def without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What one test imports is not there for the next."""
    module = sys.modules.pop("tensorrt", None)
    yield
    sys.modules.pop("tensorrt", None)
    if module is not None:
        sys.modules["tensorrt"] = module


@pytest.fixture
def board(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    cuda_double: Path,
    without_tensorrt: None,
    graphs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> EngineBoard:
    """A board with the newest TensorRT 10, or with the version that a test is given."""
    version = getattr(request, "param", "10.16.1")
    site = tmp_path / "site"
    site.mkdir()
    tensorrt_double.install(site, version)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, sys.path)]))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(cuda_double))
    monkeypatch.setenv("DOUBLE_SM", "8.7")
    monkeypatch.setattr(cuda, "LIBRARY_PATHS", (str(cuda_double / "libcudart.so.13"),))
    return EngineBoard(tmp_path, site, version, graphs)
