"""Every name that the adapter uses is one of the real bindings, and every call fits their signatures."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_device.engines import bindings, build, engine
from fedprune_device.engines.build import refit
from support.fakes import tensorrt as tensorrt_double
from support.fakes.engine_board import EngineBoard
from support.fakes.tensorrt import CENSUS, VERSIONS, Double, members

pytestmark = pytest.mark.board

SEAM = [Path(m.__file__) for m in (bindings, build, engine)]  # the only modules that touch TensorRT

OURS = (  # noqa: SIM905
    # of Python and numpy
    "append compile fullmatch get import_module items join keys pop startswith values "
    "astype concatenate ascontiguousarray dtype empty float16 float32 int32 int64 kind nbytes ndarray NDArray zeros "
    # of this package, beside what the modules define
    "batch clear cuda device graph level lines pool_bytes precision put wait close handle memory sm call"
).split()

ALL_MEMBERS = {name for kind in CENSUS["classes"].values() for name in kind}


def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in SEAM}


def attributes(tree: ast.Module) -> set[str]:
    """Names after a dot, and names that `hasattr` and `getattr` are asked for."""
    found = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            found.add(ast.literal_eval(node.args[1]))
    return found


def defined(tree: ast.Module) -> set[str]:
    """What a module of ours defines: functions, classes, fields, attributes of `self`."""
    found = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (t for whole in targets for t in ast.walk(whole)):
                if isinstance(target, ast.Name):
                    found.add(target.id)
                elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    found |= {target.attr} if target.value.id == "self" else set()
    return found


def test_nothing_else_touches_tensorrt() -> None:
    for path in SEAM[0].parent.glob("*.py"):
        if path not in SEAM:
            names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
            assert "trt" not in names, path.name
            assert "tensorrt." not in path.read_text(), path.name


def test_every_name_is_one_of_the_bindings_or_ours() -> None:
    parsed = trees()
    ours = set(OURS).union(*(defined(t) for t in parsed.values()))
    for path, tree in parsed.items():
        for name in attributes(tree) - ours:
            assert name in ALL_MEMBERS or name in CENSUS["classes"], f"{path.name}: no version of TensorRT has {name}"


def test_classes_and_constants_are_there_in_every_version_or_asked_for_first() -> None:
    asked = {"STRONGLY_TYPED", "EXPLICIT_BATCH", "FP16", "OnnxParserRefitter", "IProgressMonitor", "SerializationFlag"}
    asked |= {"SerializationFlag.EXCLUDE_WEIGHTS"}
    for path in SEAM:
        for name in tensorrt_double.names_used(path.read_text()):
            kind, _, constant = name.partition(".")
            for version in VERSIONS:
                there = members(kind, version)
                assert name in asked or constant in asked or (there and (not constant or constant in there)), (
                    f"{path.name}: TensorRT {version} has no {name}"
                )


@pytest.mark.parametrize("board", ["8.6.1", "10.0.1", "10.16.1", "11.0.0", "11.4.0"], indirect=True)
def test_every_call_has_been_made_with_arguments_that_fit(board: EngineBoard, tmp_path: Path) -> None:
    """The double refuses what doesn't fit; here it is asked whether it was asked everything."""
    selector = board.selector()
    for seed in (1, 2):
        assert board.answering(selector, board.model(seed)), selector.status
    (tmp_path / "weights.safetensors").write_bytes(b"")
    (tmp_path / "inference.onnx").write_bytes(b"no graph")
    found = bindings.find()
    with pytest.raises(Exception, match="TensorRT doesn't take the graph"):
        build.build(
            found,
            bindings.TensorRTErrors(),
            tmp_path / "inference.onnx",
            EnginePlan(),
            refittable=False,
            timings=b"",
            tell=lambda _: None,
        )
    plan = EnginePlan(precision="float16", batch=(1, 1, 4))
    assert board.answering(board.selector(plan), board.model(1))
    if found.refits:
        board.set(refit_refused=True)
        with pytest.raises(Exception, match="no such weights"):
            refit(
                found,
                bindings.TensorRTErrors(),
                (board.engines / "base.plan").read_bytes(),
                board.model(2).folder / "inference.onnx",
            )
    called = {c.partition(".")[2] for c in board.calls() if not c.startswith("built")}
    ours = set(OURS).union(*(defined(t) for t in trees().values()))
    used = set().union(*(attributes(t) for t in trees().values())) - ours
    used = {n for n in used if n in ALL_MEMBERS and not n.isupper() and not n.startswith("__")}
    there = {m for kind in CENSUS["classes"] for m in members(kind, board.version)}
    refitting = {"refit_from_file", "get_missing_weights", "refit_cuda_engine", "create_serialization_config"}
    refitting |= {"clear_flag", "serialize_with_config", "refittable"}
    expected = (used & there) - (set() if found.refits else refitting)
    assert expected - called <= {"name"}
    assert len(expected) > 25


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

    def test_what_it_doesnt_do_is_no_silent_success(self, double: Double, logger: Any) -> None:
        trt: Any = double.module
        with pytest.raises(NotImplementedError, match=r"Builder\.reset"):
            trt.Builder(logger).reset()


def test_the_census_has_what_the_field_says_of_versions() -> None:
    """Facts that NVIDIA's own notes state, so that a census of the wrong wheels is noticed."""
    for version in VERSIONS:
        major = int(version.split(".")[0])
        assert ("FP16" in members("BuilderFlag", version)) == (major < 11)
        assert ("STRONGLY_TYPED" in members("NetworkDefinitionCreationFlag", version)) == (major >= 10)
        assert bool(members("OnnxParserRefitter", version)) == (major >= 10)
    assert np.array_equal(VERSIONS, sorted(VERSIONS, key=lambda v: [int(n) for n in v.split(".")]))
