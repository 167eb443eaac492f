import threading

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.core.errors import EngineError
from fedprune.model import step_contract
from fedprune.runtime.gpu_gate import GPU_GATE
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_device.engines.engine_cache import CachedEngine
from fedprune_device.engines.engine_selector import BUILD, MAX_FAILURES, REBUILD, REFIT, CheckedSession, EngineRequest
from fedprune_device.serving.predictor import Predictor
from support.fakes.engine_board import EngineBoard, X
from support.fakes.tensorrt import VERSIONS
from support.marks import mark_soak
from support.waiting import until

pytestmark = pytest.mark.board


def agree(session: CheckedSession | None, request: EngineRequest) -> None:
    """An engine answers, and what onnxruntime answers."""
    assert session is not None
    predicted = Predictor(request.folder, session=session).predict(X)
    np.testing.assert_allclose(predicted, request.predictor.predict(X), rtol=1e-6)


@pytest.mark.parametrize("board", VERSIONS, indirect=True)
def test_an_engine_answers_what_onnxruntime_answers_with_every_tensorrt(board: EngineBoard) -> None:
    request, selector = board.model(1), board.selector()
    session = board.answering(selector, request)
    assert session is not None, selector.status
    engine = Predictor(request.folder, session=session)
    board.set()
    before = len(board.calls())
    np.testing.assert_allclose(engine.predict(X), request.predictor.predict(X), rtol=1e-6)
    assert engine.predict(X[:0]).shape == (0, 3)
    assert "executed" in board.calls()[before:]
    assert selector.status == f"TensorRT {board.version}, float32"
    # New weights come the same way with every version, refitted where that is right.
    second_request = board.model(2)
    agree(board.answering(selector, second_request), second_request)
    refits = board.version != "8.6.1" and not board.version.startswith("11.3.")
    assert selector.facts["way"] == (REFIT if refits else BUILD)
    assert all((" REFIT " in b) == refits for b in board.builds)


@pytest.mark.once
def test_an_engine_leaves_the_gpu_alone_while_a_training_is_recorded(board: EngineBoard) -> None:
    request = board.model(1)
    session = board.answering(board.selector(), request)
    assert session is not None
    before = len(board.calls())
    thread = threading.Thread(target=Predictor(request.folder, session=session).predict, args=(X,))
    with GPU_GATE.record():
        thread.start()
        thread.join(0.2)
        assert "executed" not in board.calls()[before:]
    thread.join()
    assert "executed" in board.calls()[before:]


@pytest.mark.once
@pytest.mark.parametrize(
    ("place", "plan"),
    [
        ({"board": "Thor"}, None),
        pytest.param({"l4t": "36.5"}, None, marks=pytest.mark.soak),
        pytest.param({"sm": "11.0"}, None, marks=pytest.mark.soak),
        ({"tensorrt": "10.3.0"}, None),
        ({}, EnginePlan(batch=(1, 2, 4))),
        ({}, EnginePlan(batch=(1, 1, 4), level=2)),
    ],
)
def test_an_engine_of_another_board_system_or_plan_is_built_anew(
    board: EngineBoard, place: dict[str, str], plan: EnginePlan | None
) -> None:
    request = board.model(1)
    assert board.answering(board.selector(), request)
    assert board.answering(board.selector(plan, **place), request)
    assert len(board.builds) == 2


@pytest.mark.once
@pytest.mark.parametrize(("refit_s", "rebuild_s", "way"), [(1.0, 2.0, REFIT), (2.0, 1.0, REBUILD)])
def test_each_way_is_measured_once_and_then_the_faster_one_taken(
    board: EngineBoard, refit_s: float, rebuild_s: float, way: str
) -> None:
    chosen_ways = []
    for seed in (1, 2, 3):
        selector = board.selector()
        assert board.answering(selector, board.model(seed)), selector.status
        chosen_ways.append(selector.facts["way"])
    assert chosen_ways == [BUILD, REFIT, REBUILD]
    assert [" REFIT " in b for b in board.builds] == [True, False]
    assert "known=1" in board.builds[1]
    record = selector.cache.read_record(str(selector.facts["key"]))
    assert record.refit_s is not None
    assert record.rebuild_s is not None
    selector.cache.write_record(CachedEngine(record.key, refit_s, rebuild_s))
    assert board.answering(selector, board.model(4))
    assert selector.facts["way"] == way


@pytest.mark.once
@pytest.mark.parametrize(
    "setting",
    mark_soak(["refitted_wrong", "refit_refused", "missing", "no_refitter"], soak=["refit_refused", "missing"]),
)
def test_a_bad_refit_never_answers_and_is_not_tried_again(board: EngineBoard, setting: str) -> None:
    selector = board.selector()
    assert board.answering(selector, board.model(1))
    board.set(**{setting: True})
    for seed in (2, 3):
        request = board.model(seed)
        agree(board.answering(selector, request), request)
        assert selector.facts["way"] == REBUILD
    assert board.calls().count("refit from a file") == (0 if setting == "no_refitter" else 1)


def test_where_refittable_engines_compute_something_else_plain_ones_are_built(board: EngineBoard) -> None:
    board.set(refittable_wrong=True)
    selector = board.selector()
    assert board.answering(selector, board.model(1)), selector.status
    assert [" REFIT " in b for b in board.builds] == [True, False]
    assert not (board.engines / "base.plan").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("wrong", "the engine contradicts onnxruntime: expected a deviation of at most"),
        ("killed", "SIGKILL. Memory ran out"),
        ("load_kills", "ended by SIGSEGV"),
    ],
)
def test_onnxruntime_goes_on_where_a_child_makes_no_good_engine(board: EngineBoard, setting: str, words: str) -> None:
    board.set(**{setting: True})
    selector = board.selector()
    assert board.answering(selector, board.model(1)) is None
    assert selector.status.startswith("onnxruntime (")
    assert words in selector.status
    assert not (board.engines / "engine.plan").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DOUBLE_MEMORY", "10", "cudaMalloc failed: out of memory (2)"),
        ("DOUBLE_DEVICES", "0", "CUDA finds none"),
        ("DOUBLE_DEVICES", "-1", "driver too old"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_a_reason_and_without_one_tensorrt_is_not_loaded(
    board: EngineBoard, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    selector = board.selector()
    assert board.answering(selector, board.model(1)) is None
    assert words in selector.status
    assert bool(board.calls()) == (name == "DOUBLE_MEMORY")


def test_without_a_tensorrt_that_loads_onnxruntime_answers(board: EngineBoard) -> None:
    module = board.site / "tensorrt.py"
    module.write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    for words in ("libnvinfer.so.10", "TensorRT is not installed"):
        selector = board.selector()
        assert board.answering(selector, board.model(1)) is None
        assert words in selector.status
        module.unlink(missing_ok=True)


def test_an_engine_on_the_disk_is_checked_again_before_it_answers(board: EngineBoard) -> None:
    request = board.model(1)
    assert board.answering(board.selector(), request)
    board.set(wrong=True)
    selector = board.selector()
    assert board.answering(selector, request) is None
    assert "contradicts" in selector.status


def test_builds_that_fail_are_given_up_until_somebody_asks(board: EngineBoard) -> None:
    board.set(out_of_memory=True)
    for seed in range(MAX_FAILURES + 2):
        selector = board.selector()
        assert board.answering(selector, board.model(seed)) is None
        assert "memory could not be allocated" in selector.status
    assert len(board.builds) == MAX_FAILURES
    board.set()
    assert board.answering(selector, board.model(9)) is None
    assert board.answering(selector, board.model(9), rebuild=True)
    assert board.answering(selector, board.model(10))


def test_an_engine_that_ended_a_process_is_not_loaded_again(board: EngineBoard) -> None:
    request = board.model(1)
    selector = board.selector()
    assert board.answering(selector, request)
    with selector.cache.mark_loading(str(selector.facts["sha256"])):
        marker = (board.engines / "loading.json").read_bytes()
    assert not (board.engines / "loading.json").exists()
    (board.engines / "loading.json").write_bytes(marker)  # as a crash leaves it
    with (
        pytest.raises(EngineError, match="ended the process"),
        selector.cache.mark_loading(str(selector.facts["sha256"])),
    ):
        pytest.fail("it was loaded")
    # A new one, which a child process has tried, may.
    assert board.answering(board.selector(), request)
    assert len(board.builds) + board.calls().count("refitted") == 2


@pytest.mark.once
@pytest.mark.parametrize("name", ["engine.plan", "engine.json", "record.json", "timing.cache", "timing.json"])
def test_damage_on_the_disk_costs_time_alone(board: EngineBoard, name: str) -> None:
    request = board.model(1)
    assert board.answering(board.selector(), request)
    path = board.engines / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)
    agree(board.answering(board.selector(), request), request)


@pytest.mark.parametrize("setting", ["no_builder", "no_runtime"])
def test_what_the_bindings_raise_is_a_reason(board: EngineBoard, setting: str) -> None:
    board.set(**{setting: True})
    selector = board.selector()
    assert board.answering(selector, board.model(1)) is None
    assert "factory function returned nullptr" in selector.status
    assert "Traceback" not in selector.status
    board.set()
    assert board.answering(selector, board.model(1))
    board.set(**{setting: True})
    assert (board.answering(board.selector(), board.model(1)) is None) == (setting == "no_runtime")


@pytest.mark.parametrize("setting", ["run_fails", "run_raises"])
def test_onnxruntime_takes_over_from_an_engine_that_fails(board: EngineBoard, setting: str) -> None:
    request, selector = board.model(1), board.selector()
    session = board.answering(selector, request)
    assert session is not None
    board.set(**{setting: True})
    engine = Predictor(request.folder, session=session)
    np.testing.assert_array_equal(engine.predict(X), request.predictor.predict(X))
    assert selector.status.startswith("onnxruntime (the engine failed")
    board.set()
    before = len(board.calls())
    engine.predict(X)
    assert board.calls()[before:] == []


def test_stopping_an_agent_is_no_failure(board: EngineBoard) -> None:
    board.set(sleep=600)
    for _ in range(MAX_FAILURES + 1):
        selector = board.selector()
        selector.request_engine(board.model(1))
        selector.turn()
        selector.close()
    board.set()
    assert board.answering(board.selector(), board.model(1))


def test_two_processes_dont_make_engines_at_once(board: EngineBoard) -> None:
    board.set(sleep=600)
    first, second = board.selector(), board.selector()
    first.request_engine(board.model(1))
    first.turn()
    assert board.answering(second, board.model(1)) is None
    assert "another process makes an engine" in second.status
    first.close()
    board.set()
    assert board.answering(second, board.model(1))


def test_what_is_no_longer_wanted_is_ended(board: EngineBoard) -> None:
    board.set(sleep=600)
    selector = board.selector()
    selector.request_engine(board.model(1))
    selector.turn()
    until(lambda: bool(board.builds))
    board.set()
    request = board.model(2)
    session = board.answering(selector, request)
    assert session is not None
    agree(session, request)


def test_a_model_that_is_replaced_meanwhile_gets_no_engine(board: EngineBoard) -> None:
    request = board.model(1)
    (request.folder / "weights.safetensors").write_bytes(tensorfile.encode({"w": X}))
    selector = board.selector()
    assert board.answering(selector, request) is None
    assert "replaced meanwhile" in selector.status


def test_a_plan_for_a_graph_that_isnt_there_is_a_reason(board: EngineBoard) -> None:
    selector = board.selector(EnginePlan(graph="inference-float16.onnx"))
    assert board.answering(selector, board.model(1)) is None
    assert "inference-float16.onnx isn't there" in selector.status


@pytest.mark.once
@pytest.mark.parametrize("board", ["8.6.1", "10.3.0", "11.4.0"], indirect=True)
@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
def test_precision_is_the_plans(board: EngineBoard, precision: str) -> None:
    selector = board.selector(EnginePlan(precision=precision, batch=(1, 1, 4), pool_bytes=2**25))
    assert board.answering(selector, board.model(1)), selector.status
    (built,) = board.builds
    assert ("TF32" in built) == (precision != "float32")
    assert ("FP16" in built) == (precision == "float16" and board.version == "8.6.1")
    assert "pool={'WORKSPACE': 33554432}" in built


def test_a_batch_is_split_into_what_the_engine_takes_and_filled_up(board: EngineBoard) -> None:
    selector, request = board.selector(EnginePlan(batch=(2, 3, 4))), board.model(1)
    session = board.answering(selector, request)
    assert session is not None, selector.status
    assert "shapes [[2, 6], [3, 6], [4, 6]]" in board.calls()
    expected = request.predictor.predict(X)
    for count in (0, 1, 2, 4, 5, 9):
        out = session.run({step_contract.X: X[:count]})[step_contract.LOGITS]
        np.testing.assert_allclose(out, expected[:count], rtol=1e-6)
