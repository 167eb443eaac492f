"""Sessions of onnxruntime: what comes in, what goes out, and what must not leave the machine."""

import ctypes
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune.runtime import missing_kernels, session
from fedprune.runtime.gpu_gate import GPU_GATE
from fedprune.runtime.placed_runs import GpuLostError
from fedprune.runtime.session import OnnxSession, load_graph
from support.fakes.cuda_runtime import CudaRuntime
from support.paths import GRAPHS, ROOT

pytestmark = pytest.mark.board

GRAPH = ROOT / "device_runtime" / "fedprune_device" / "assets" / "probe_training-cpu.onnx"


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> CudaRuntime:
    return install_runtime(monkeypatch, CudaRuntime())


def install_runtime(monkeypatch: pytest.MonkeyPatch, double: CudaRuntime) -> CudaRuntime:
    """The onnxruntime that every session imports from now on."""
    monkeypatch.setitem(sys.modules, "onnxruntime", cast("ModuleType", double))
    return double


def test_a_quantised_graph_computes_in_integers_unless_it_is_to_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = list[str]()

    def load_and_note(*graph: Any, **options: Any) -> Any:
        loaded = load_graph(*graph, **options)
        levels.append(loaded.get_session_options().graph_optimization_level.name)
        return loaded

    monkeypatch.setattr(session, "load_graph", load_and_note)
    OnnxSession(GRAPH, exact=True)
    OnnxSession(GRAPH)
    assert levels == ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"]


def test_a_file_that_is_no_graph_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"nothing of the kind")

    with pytest.raises(ModelError, match=r"bad\.onnx"):
        OnnxSession(path)


def test_feeds_that_do_not_fit_are_one_clear_error() -> None:
    with pytest.raises(ModelError, match="couldn't run"):
        OnnxSession(GRAPH).run({"x": np.zeros(3, np.float32)})


def test_outputs_are_written_into_given_arrays(small: Path) -> None:
    session = OnnxSession(small)
    feeds = {n: np.asfortranarray(v) if n == "x" else v for n, v in feeds_of(session).items()}
    expected = session.run(feeds)
    name = session.outputs[0]
    buffer = np.empty_like(expected[name])

    outputs = session.run(feeds, into={name: buffer})

    assert outputs[name] is buffer
    assert buffer.tobytes() == expected[name].tobytes()
    assert {n: v.tobytes() for n, v in outputs.items()} == {n: v.tobytes() for n, v in expected.items()}


@pytest.mark.parametrize("change", ["shape", "type", "order", "read only", "name"])
def test_an_array_that_an_output_does_not_fit_is_one_clear_error(small: Path, change: str) -> None:
    session = OnnxSession(small)
    feeds, name = feeds_of(session), session.outputs[0]
    right = session.run(feeds)[name]
    buffer = {
        "shape": lambda: np.empty((*right.shape, 1), right.dtype),
        "type": lambda: np.empty(right.shape, np.float64),
        "order": lambda: np.empty((*right.shape[:-1], 2 * right.shape[-1]), right.dtype)[..., ::2],
        "read only": lambda: np.broadcast_to(right[:1], right.shape),
        "name": lambda: np.empty_like(right),
    }[change]()
    with pytest.raises(ModelError, match="output"):
        session.run(feeds, into={"another" if change == "name" else name: buffer})


def test_runs_that_stay_bound_read_the_feeds_of_each(small: Path) -> None:
    session = OnnxSession(small)
    feeds, name = feeds_of(session), session.outputs[0]
    buffers = [np.empty_like(session.run(feeds)[name]) for _ in range(2)]
    for number in range(1, 9):
        if number % 3:
            feeds["x"] = np.asfortranarray(np.full_like(feeds["x"], number))
        else:  # in place
            feeds["x"] *= -2
        expected = session.run(feeds)[name]
        session.run(feeds, into={name: buffers[number % 2]})
        assert buffers[number % 2].tobytes() == expected.tobytes()

    # Another number of samples doesn't fit, and what failed leaves nothing behind.
    with pytest.raises(ModelError):
        session.run({**feeds, "x": np.concatenate([feeds["x"]] * 2)}, into={name: buffers[0]})
    session.run(feeds, into={name: buffers[0]})
    assert buffers[0].tobytes() == expected.tobytes()


def test_outputs_of_a_run_that_stays_bound_are_not_written_again() -> None:
    session = OnnxSession(GRAPH, training=True)
    feeds = feeds_of(session)
    rng = np.random.default_rng(0)
    feeds |= {n: rng.standard_normal(v.shape).astype(v.dtype) for n, v in feeds.items() if v.dtype.kind == "f"}
    next_name = next(n for n in session.outputs if n != step_contract.LOSS)
    into = {next_name: np.empty_like(session.run(feeds)[next_name])}

    first = session.run(feeds, into=into)[step_contract.LOSS]
    value = first.tobytes()
    second = session.run({**feeds, "x": -3 * feeds["x"]}, into=into)[step_contract.LOSS]

    assert first.tobytes() == value != second.tobytes()


def test_arrays_are_let_go_when_they_are_no_longer_needed(small: Path) -> None:
    session = OnnxSession(small)
    feeds, name = feeds_of(session), session.outputs[0]
    buffer = np.empty_like(session.run(feeds)[name])
    session.run(feeds, into={name: buffer})
    array = weakref.ref(buffer)
    del buffer
    assert array() is not None  # bound, as long as the next run may write into it

    session.release()

    assert array() is None


def test_large_arrays_are_let_go_after_each_run(small: Path) -> None:
    """A board plans its memory for one batch and one sum of gradients."""
    session = OnnxSession(small)
    feeds = feeds_of(session, 200_000)
    assert feeds["x"].nbytes > 2**22
    session.run(feeds, into={name: np.empty_like(value) for name, value in session.run(feeds).items()})

    array = weakref.ref(feeds.pop("x"))  # not in the assert, which would hold the array
    assert array() is None


def test_onnxruntime_leaves_no_trace_of_telemetry(tmp_path: Path) -> None:
    code = (
        f"from pathlib import Path; from fedprune.runtime.session import OnnxSession; OnnxSession(Path({str(GRAPH)!r}))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    subprocess.run([sys.executable, "-c", code], env={**environment, "HOME": str(tmp_path)}, check=True)

    assert list(tmp_path.rglob("*")) == []


def feeds_of(session: OnnxSession, rows: int = 2) -> dict[str, Any]:
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    return {
        n: np.full([d if isinstance(d, int) else rows for d in shape], 1, kinds[kind])
        for n, (kind, shape) in session.inputs.items()
    }


@pytest.fixture
def small(tmp_path: Path) -> Path:
    from fedprune.core import tensorfile

    (tmp_path / "inference.onnx").write_bytes((GRAPHS / "inference.onnx").read_bytes())
    weights = {"w": np.ones((3, 6), np.float32), "b": np.zeros(3, np.float32)}
    (tmp_path / "weights.safetensors").write_bytes(tensorfile.encode(weights))
    return tmp_path / "inference.onnx"


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [("offers", "has no CUDA provider"), ("accepts", "driver too old"), ("loads", "can't be loaded")],
)
def test_the_cpu_computes_where_cuda_doesnt_work(
    small: Path, monkeypatch: pytest.MonkeyPatch, lacks: str, reason: str
) -> None:
    double = install_runtime(monkeypatch, CudaRuntime(**{lacks: False}))
    session = OnnxSession(small, cuda=True)
    assert session.provider == "cpu"
    assert reason in session.cpu_reason
    session.run(feeds_of(session))
    assert double.runs == ["cpu"]


def test_a_run_that_fails_on_cuda_is_done_on_the_cpu(small: Path, runtime: CudaRuntime) -> None:
    session = OnnxSession(small, cuda=True)
    feeds = feeds_of(session)
    before = session.run(feeds)
    with pytest.raises(ModelError, match="couldn't run"):
        session.run({"x": np.zeros(3, np.float32)})
    assert session.provider == "cuda", "what no provider takes is no fault of CUDA's"
    runtime.fails = True
    after = session.run(feeds)
    assert session.provider == "cpu"
    assert "out of memory" in session.cpu_reason
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    session.run(feeds)
    assert runtime.runs == ["cuda", "cuda", "cpu", "cuda", "cpu", "cpu"]


# Its message (https://github.com/microsoft/onnxruntime/issues/27725), and one in which CUDA's words come after
# more text than the log quotes.
FAILURE = "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Gemm node. Status Message: "
CUDA_WORDS = "no kernel image is available for execution on the device"
NO_KERNELS = [
    f"{FAILURE}CUDA error cudaErrorNoKernelImageForDevice:{CUDA_WORDS}",
    f"{FAILURE}{'std::conditional_t<THRW, void, Status> CudaCall ' * 6}CUDA failure 209: {CUDA_WORDS} ; GPU=0",
]


class Driver:
    """CUDA's driver with one GPU of compute capability 8.7."""

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        return 0 if number == 0 else 101

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: 8, 76: 7}[attribute]
        return 0


@pytest.mark.parametrize("message", NO_KERNELS)
@pytest.mark.parametrize(
    ("release", "remedy"),
    [
        ("# R36 (release), REVISION: 4.3", "for JetPack 6.2, from https://pypi.jetson-ai-lab.io/jp6/cu126"),
        ("# R39 (release), REVISION: 2.0", "for JetPack 7.2, from https://pypi.jetson-ai-lab.io/sbsa/cu130"),
        ("", "that was built for it"),
    ],
)
def test_a_build_without_kernels_for_the_gpu_is_named_with_the_right_one(
    small: Path, runtime: CudaRuntime, monkeypatch: pytest.MonkeyPatch, message: str, release: str, remedy: str
) -> None:
    path = small.parent / "nv_tegra_release"
    path.write_text(release)
    monkeypatch.setattr(missing_kernels, "TEGRA_RELEASE", path)
    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": Driver()}.__getitem__)
    session = OnnxSession(small, cuda=True)
    runtime.fails, runtime.failure = True, message

    outputs = session.run(feeds_of(session))

    assert session.provider == "cpu"
    assert "no kernels for compute capability 8.7" in session.cpu_reason
    assert remedy in session.cpu_reason
    np.testing.assert_array_equal(outputs["logits"], OnnxSession(small).run(feeds_of(session))["logits"])


@pytest.mark.parametrize("message", NO_KERNELS)
def test_a_build_without_kernels_is_named_where_a_graph_is_not_even_loaded(
    small: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    install_runtime(monkeypatch, CudaRuntime(accepts=False)).refusal = message
    assert "has no kernels for" in OnnxSession(small, cuda=True).cpu_reason


def test_a_build_without_kernels_is_named_where_the_driver_is_silent(small: Path, runtime: CudaRuntime) -> None:
    session = OnnxSession(small, cuda=True)
    runtime.fails, runtime.failure = True, NO_KERNELS[0]
    session.run(feeds_of(session))
    assert "has no kernels for" in session.cpu_reason


def test_what_was_placed_goes_on_on_the_cpu_when_cuda_fails(small: Path, runtime: CudaRuntime) -> None:
    session = OnnxSession(small, cuda=True)
    feeds = session.place(feeds_of(session), "feeds")
    expected = session.run(feeds)
    name = session.outputs[0]
    into = session.place({name: np.zeros_like(expected[name])}, "outputs")
    runtime.fails = True
    for provider in ("cuda", "cpu"):
        assert session.provider == provider
        np.testing.assert_array_equal(session.run(feeds, into=into)[name], expected[name])


def test_what_is_lost_with_the_gpu_is_said(small: Path, runtime: CudaRuntime) -> None:
    session = OnnxSession(small, cuda=True)
    feeds = feeds_of(session)
    placed = session.place(feeds, "feeds")
    runtime.fails = runtime.loses = True
    with pytest.raises(GpuLostError, match="illegal address"):
        session.run(placed)
    assert session.provider == "cpu"
    assert session.run(feeds)


def placed_runs(small: Path, runs: int) -> None:
    """Runs on samples of two sizes in turn, whose outputs have two places in turn."""
    session, plain = OnnxSession(small, cuda=True, training=True), OnnxSession(small)
    name = session.outputs[0]
    rng = np.random.default_rng(0)
    for number in range(runs):
        samples = {n: rng.standard_normal(v.shape).astype(v.dtype) for n, v in feeds_of(session).items()}
        expected = plain.run(samples)[name]
        place = session.place({name: np.zeros_like(expected)}, f"outputs {number % 2}")
        assert session.run(samples, into=place)[name] is place[name]
        np.testing.assert_array_equal(np.asarray(place[name]), expected)
        np.testing.assert_array_equal(session.run(samples)[name], expected)


def test_runs_alike_are_recorded_and_replayed_on_new_samples(small: Path, runtime: CudaRuntime) -> None:
    placed_runs(small, runs=12)
    assert len(runtime.recordings) == 2
    assert runtime.replays == 12 - 2 * 3


def test_a_recording_without_room_is_left_out(small: Path, runtime: CudaRuntime) -> None:
    runtime.places = 2  # those of the outputs
    placed_runs(small, runs=12)
    assert (runtime.replays, runtime.opened.count("cpu")) == (0, 1)


@pytest.mark.parametrize("lacks", ["unpartitioned", "unrecordable"])
def test_what_cannot_be_recorded_runs_on_the_gpu_as_it_is(small: Path, runtime: CudaRuntime, lacks: str) -> None:
    setattr(runtime, lacks, True)
    placed_runs(small, runs=12)
    assert runtime.replays == 0
    assert runtime.opened[0] == "cuda"


def test_predictions_stay_on_the_gpu_while_a_training_is_recorded(small: Path, runtime: CudaRuntime) -> None:
    predictor, trained = OnnxSession(small, cuda=True), threading.Event()

    def predict() -> None:
        while not trained.is_set():
            predictor.run(feeds_of(predictor))

    thread = threading.Thread(target=predict)
    thread.start()
    try:
        for _ in range(10):
            placed_runs(small, runs=8)
    finally:
        trained.set()
        thread.join()
    assert predictor.provider == "cuda", predictor.cpu_reason
    assert len(runtime.recordings) == 20


def test_arrays_are_copied_from_the_gpu_once_a_recording_is_over(small: Path, runtime: CudaRuntime) -> None:
    session = OnnxSession(small, cuda=True)
    placed_feeds, copies = session.place(feeds_of(session), "feeds"), list[object]()
    thread = threading.Thread(target=lambda: copies.extend(map(np.asarray, placed_feeds.values())))
    with GPU_GATE.record():
        thread.start()
        thread.join(0.2)
        assert not copies
    thread.join()
    assert len(copies) == len(placed_feeds)


def test_arrays_of_other_shapes_are_released_unless_a_recording_reads_them(small: Path, runtime: CudaRuntime) -> None:
    session = OnnxSession(small, cuda=True, training=True)
    name = session.outputs[0]

    def train(rows: int, runs: int) -> None:
        feeds = feeds_of(session, rows)
        into = session.place({name: np.zeros_like(OnnxSession(small).run(feeds)[name])}, "outputs")
        for _ in range(runs):
            session.run(feeds, into=into)

    train(2, runs=5)
    assert len(runtime.recordings) == 1
    recorded = len(runtime.values)
    for rows in (3, 4, 5):
        train(rows, runs=1)
        assert len(runtime.values) == recorded + 1
    replays = runtime.replays
    train(2, runs=1)
    assert (len(runtime.values), runtime.replays) == (recorded, replays + 1)
