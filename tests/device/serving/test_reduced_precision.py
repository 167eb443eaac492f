"""A board that serves at lower precision: prepared of every round's weights, checked, swapped whole."""

import logging
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.model.recipe import Recipe
from fedprune.runtime.precision import pack_graphs, unpack_graphs
from fedprune.runtime.precision_files import PRECISIONS, files_of, served_files
from fedprune.wire.messages import BlobRequest
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import Targets
from fedprune_device.serving.model_slots import ServingRecord
from fedprune_device.serving.reduced_precision import PrecisionCheck, ReducedPrecision
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.round_runner import DamagedBlobError, RoundRunner
from support.fakes.agent_fleet import MemoryLink, MemoryServer
from support.fakes.agent_harness import agent_on
from support.fakes.hidden_board import CLASSES, DEVICE, HIDDEN, HiddenBoard, hidden_weights, logits
from support.faults.power_cuts import EACH_KIND, CutError, cuts, power

pytestmark = pytest.mark.board

Array = np.ndarray[Any, Any]
RECIPE = Recipe(epochs=2, batch_size=10, lr=0.1)
BOUNDS = {"float16": 5e-3, "int8": 5e-2}


class Board(HiddenBoard):
    """A board whose server sends graphs of lower precision, too."""

    def kits(self, *precisions: str, **broken: bytes) -> dict[str, Any]:
        with DeviceStore(self.root) as store:
            raw = {p: (self.graphs / f"hidden_half_{p}.safetensors").read_bytes() for p in precisions}
            return {p: store.blobs.put(kit) for p, kit in {**raw, **broken}.items()}

    def work(self, number: int, serve: str, kits: dict[str, Any], **fields: Any) -> ServingRecord:
        weights = hidden_weights(HIDDEN // 2, seed=number)
        offer = self.offer(number, RECIPE, weights, graph="kept", lowered=kits or None, **fields)
        with DeviceStore(self.root) as store:
            bench = RoundRunner(
                DEVICE, store.blobs, store.slots, self.data, states=store.local_states, lowering=ReducedPrecision(serve)
            )
            bench.commit(bench.carry_out(offer))
            record = store.slots.current()
        assert record is not None
        return record

    def slot(self, record: ServingRecord) -> Path:
        return self.root / "serving" / record.slot


@pytest.fixture
def board(tmp_path: Path, graphs: Path, data: LocalData) -> Board:
    return Board(tmp_path / "state", graphs, data)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_every_round_prepares_its_own_weights(board: Board, precision: str) -> None:
    kits = board.kits("float16", "int8")
    digests = set()
    for number in (1, 2, 3):
        record = board.work(number, precision, kits)
        assert (record.round, record.precision) == (number, precision)
        file_names = {p.name for p in board.slot(record).iterdir()}
        assert file_names == {"inference.onnx", "weights.safetensors", *served_files(precision)}
        leftover_names = {p.name for p in (board.root / "serving" / "next").iterdir()}
        assert not leftover_names & {n for p in PRECISIONS for n in files_of(p)}
        with DeviceStore(board.root) as store:
            predictor, opened = store.slots.open()
        expected = logits(tensorfile.load_tensors(board.slot(record) / "weights.safetensors"), board.data.x_test)
        outputs = predictor.predict(board.data.x_test)
        assert opened == record
        assert 0 < np.abs(outputs - expected).max() < BOUNDS[precision] * np.abs(expected).max()
        digests.add(record.files[served_files(precision)[1]])
    assert len(digests) == 3


def test_validation_samples_decide_where_there_are_some(data: LocalData) -> None:
    class InputRecorder:
        def predict(self, x: Array, _: int) -> Array:
            self.x = x
            return np.zeros((len(x), CLASSES), np.float32)

    recorder: Any = InputRecorder()
    apart = replace(data, x_val=data.x_train[:7] + 1, y_val=data.y_train[:7])
    PrecisionCheck(recorder, apart, RECIPE, Targets("cross_entropy", CLASSES))
    np.testing.assert_array_equal(recorder.x, apart.x_val)
    PrecisionCheck(
        recorder, replace(data, x_val=data.x_val[:0], y_val=data.y_val[:0]), RECIPE, Targets("cross_entropy", CLASSES)
    )
    np.testing.assert_array_equal(recorder.x, data.x_train[:512])


@pytest.mark.parametrize(
    ("times", "fastest"),
    [((10, 9.5, 9.1), "float32"), ((10, 12, 8), "int8"), ((10, 7, 8), "float16"), ((10, 30, 20), "float32")],
)
def test_the_fastest_is_faster_by_more_than_chance(
    data: LocalData, times: tuple[float, ...], fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("fedprune_device.serving.reduced_precision.time.perf_counter", lambda: now[0])

    class Slow:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def predict(self, _: object) -> None:
            now[0] += self.seconds

    models: Any = {p: Slow(t) for p, t in zip(("float32", "float16", "int8"), times, strict=True)}
    assert ReducedPrecision("fastest")._choose_precision(models, data) == fastest


def test_a_model_that_says_something_else_does_not_serve(board: Board, caplog: pytest.LogCaptureFixture) -> None:
    """The bound of float16 is made so small that nothing is left of the weights."""
    graphs = unpack_graphs((board.graphs / "hidden_half_float16.safetensors").read_bytes(), "float16")
    bound = np.float32(np.finfo(np.float16).max).tobytes()
    prepare = graphs["prepare-float16.onnx"]
    assert prepare.count(bound) >= 1
    graphs["prepare-float16.onnx"] = prepare.replace(bound, np.float32(1e-6).tobytes())
    kits = board.kits(float16=pack_graphs(graphs))
    with caplog.at_level(logging.WARNING, "fedprune.device"):
        record = board.work(1, "float16", kits)
    assert record.precision == "float32"
    assert {p.name for p in board.slot(record).iterdir()} == {"inference.onnx", "weights.safetensors"}
    assert "the model doesn't serve with float16" in caplog.text


@pytest.mark.parametrize("what", ["other", "graph"])
def test_graphs_that_are_none_leave_float32(board: Board, what: str, caplog: pytest.LogCaptureFixture) -> None:
    graphs = unpack_graphs((board.graphs / "hidden_half_int8.safetensors").read_bytes(), "int8")
    broken = {
        "other": (board.graphs / "hidden_half_float16.safetensors").read_bytes(),
        "graph": pack_graphs(graphs | {"prepare-int8.onnx": b"no graph"}),
    }[what]
    with caplog.at_level(logging.WARNING, "fedprune.device"):
        record = board.work(1, "int8", board.kits(int8=broken))
    assert record.precision == "float32"
    assert "the model doesn't serve with int8" in caplog.text
    assert {p.name for p in board.slot(record).iterdir()} == {"inference.onnx", "weights.safetensors"}


def test_graphs_that_the_disk_damaged_are_named_to_be_pulled_again(board: Board) -> None:
    kits = board.kits("int8")
    with DeviceStore(board.root) as store:
        path = store.blobs.path(kits["int8"].sha256)
    path.chmod(0o600)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(DamagedBlobError) as raised:
        board.work(1, "int8", kits)
    assert raised.value.sha256 == kits["int8"].sha256
    assert path.exists(), "it may be on its way anew already"


@pytest.mark.parametrize("name", served_files("int8"))
def test_in_place_of_a_damaged_model_the_one_before_serves(board: Board, name: str) -> None:
    kits = board.kits("int8")
    before, after = board.work(1, "int8", kits), board.work(2, "int8", kits)
    path = board.slot(after) / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with DeviceStore(board.root) as store:
        assert store.slots.current() == before


@pytest.mark.parametrize("serve", ["float32", "int8"])
def test_an_agent_pulls_and_serves_what_it_is_told_to(
    tmp_path: Path, graphs: Path, data: LocalData, serve: str
) -> None:
    server = MemoryServer(tmp_path / "server", graphs, hidden_weights(HIDDEN // 2))
    put = server.blobs.put
    kits = {p: put((graphs / f"hidden_half_{p}.safetensors").read_bytes()) for p in ("float16", "int8")}
    fields: dict[str, Any] = {
        "training": put((graphs / "kept.onnx").read_bytes()),
        "inference": put((graphs / "hidden_half.onnx").read_bytes()),
        "widths": (HIDDEN // 2,),
        "lowered": kits,
    }
    server.plan = [server.offer(n, RECIPE, **fields) for n in (1, 2)]
    with DeviceStore(tmp_path / "state") as store:
        agent = agent_on(store, MemoryLink(server), data, precision=serve)
        late = threading.Timer(60, agent.stop)
        late.start()
        agent.run(until_finished=True)
        assert late.is_alive()
        late.cancel()
        record = store.slots.current()
    assert (record.round, record.precision) == (2, serve)
    requested = {m.sha256 for m in server.seen if isinstance(m, BlobRequest)}
    assert requested & {k.sha256 for k in kits.values()} == ({kits["int8"].sha256} if serve == "int8" else set())


@pytest.mark.parametrize("kind", EACH_KIND)
def test_a_cut_at_any_write_leaves_the_old_or_the_new_model(board: Board, tmp_path: Path, kind: str) -> None:
    kits = board.kits("int8")
    before = board.work(1, "int8", kits)
    offer = board.offer(2, RECIPE, hidden_weights(HIDDEN // 2, seed=2), graph="kept", lowered=kits)

    def work(root: Path) -> None:
        with DeviceStore(root) as store:
            bench = RoundRunner(
                DEVICE,
                store.blobs,
                store.slots,
                board.data,
                states=store.local_states,
                lowering=ReducedPrecision("int8"),
            )
            bench.commit(bench.carry_out(offer))

    def serves(root: Path) -> ServingRecord:
        with DeviceStore(root) as store:
            predictor, record = store.slots.open()
            predictor.check(CLASSES)
            return record

    calm, cut = tmp_path / "calm", tmp_path / "cut"
    shutil.copytree(board.root, calm)
    with power() as supply:
        work(calm)
    after = serves(calm)
    assert (before.precision, after.precision) == ("int8", "int8")
    assert before.files[served_files("int8")[1]] != after.files[served_files("int8")[1]]
    for at, how in cuts(kind, supply.names):
        shutil.copytree(board.root, cut)
        with power(at, how), pytest.raises(CutError):
            work(cut)
        assert serves(cut) in (before, after)
        work(cut)
        assert replace(serves(cut), slot=after.slot) == after
        shutil.rmtree(cut)


def test_a_board_that_trains_alone_goes_on_from_float32(board: Board) -> None:
    """What it lowers is what it has trained, from the float32 model that lies beside the lowered one."""
    record = board.work(1, "int8", board.kits("int8"))
    with DeviceStore(board.root) as store:
        raw = store.slots.weights(record)
    assert tensorfile.decode(raw).keys() == hidden_weights(HIDDEN // 2).keys()
    assert all(v.dtype == np.float32 for v in tensorfile.decode(raw).values())
