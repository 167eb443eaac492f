"""Every name that the adapter uses is one of the real bindings, and every call fits their signatures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune_device.engines import bindings
from support.fakes.tensorrt import VERSIONS, Double, members

pytestmark = pytest.mark.board


class TestTheDouble:
    """It is only worth what it refuses."""

    @pytest.fixture
    def double(self, tmp_path: Path) -> Double:
        return Double("11.4.0", tmp_path)

    @pytest.fixture
    def logger(self, double: Double) -> Any:
        return bindings.TensorRTErrors().logger(double.module)

    def test_names_of_other_versions_are_unknown(self, double: Double, logger: Any, tmp_path: Path) -> None:
        trt: Any = double.module
        assert not hasattr(trt.BuilderFlag, "FP16")
        assert hasattr(Double("8.6.1", tmp_path).kinds["BuilderFlag"], "FP16")
        config = trt.Builder(logger).create_builder_config()
        with pytest.raises(AttributeError):
            config.max_workspace_size = 1
        with pytest.raises(AttributeError):
            _ = config.max_workspace_size

    def test_wrong_arguments_are_refused(self, double: Double, logger: Any) -> None:
        trt: Any = double.module
        builder = trt.Builder(logger)
        config = builder.create_builder_config()
        for wrong in (
            lambda: trt.Builder(),
            lambda: trt.Builder("a logger"),
            lambda: trt.IBuilderConfig(),
            lambda: builder.create_network("flags"),
            lambda: builder.create_network(flags=0, more=1),
            lambda: config.set_memory_pool_limit(1, 2**20),
            lambda: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
            lambda: config.set_flag(trt.MemoryPoolType.WORKSPACE),
            lambda: config.create_timing_cache("text"),
        ):
            with pytest.raises(TypeError):
                wrong()
        with pytest.raises(TypeError):
            config.builder_optimization_level = "3"


def test_the_census_has_what_the_field_says_of_versions() -> None:
    """Facts that NVIDIA's own notes state, so that a census of the wrong wheels is noticed."""
    for version in VERSIONS:
        major = int(version.split(".")[0])
        assert ("FP16" in members("BuilderFlag", version)) == (major < 11)
        assert ("STRONGLY_TYPED" in members("NetworkDefinitionCreationFlag", version)) == (major >= 10)
        assert bool(members("OnnxParserRefitter", version)) == (major >= 10)
    assert np.array_equal(VERSIONS, sorted(VERSIONS, key=lambda v: [int(n) for n in v.split(".")]))
