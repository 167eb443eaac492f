import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.core.errors import ExitCode, RuntimeUnavailableError
from fedprune.model.selection import Tensors
from fedprune.planning.probe_report import ProbeReport
from fedprune.runtime.bundle import MANIFEST, open_bundle
from fedprune_device.cli import main
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import log_prior
from fedprune_device.hardware.runtime_process import RuntimeProcess
from fedprune_device.launcher.launcher import choose_slot
from fedprune_device.serving.model_slots import ServingRecord
from fedprune_device.storage.state_directory import DeviceStore
from support.fakes.runtime_releases import OUTSIDE, make_release, set_up, source
from support.fakes.sample_files import wav

pytestmark = pytest.mark.board

Capture = pytest.CaptureFixture[str]


def serve(root: Path, model: Path, weights: Tensors, **settings: Any) -> Path:
    """A board's folder in which a model of three outputs serves."""
    with DeviceStore(root) as store:
        raw = tensorfile.encode(weights)
        graph = model / "inference.onnx"
        store.slots.stage(graph, raw)
        files = {
            "inference.onnx": tensorfile.sha256_hex(graph.read_bytes()),
            "weights.safetensors": tensorfile.sha256_hex(raw),
        }
        store.slots.install(ServingRecord("job", 1, 3, files, **settings))
    return root


@pytest.fixture
def state(tmp_path: Path, model: Path, weights: Tensors) -> Path:
    return serve(tmp_path / "state", model, weights, offset=(0.0, 50.0, 0.0))


def test_predictions_use_the_serving_model_and_its_offset(
    tmp_path: Path, state: Path, weights: Tensors, data: LocalData
) -> None:
    np.save(tmp_path / "x.npy", data.x_test)
    out = tmp_path / "out.npy"
    code = main.main(["predict", "--state", str(state), "--input", str(tmp_path / "x.npy"), "--output", str(out)])
    assert code == ExitCode.OK
    expected = data.x_test @ weights["w"].T + weights["b"] + np.array([0, 50, 0])
    np.testing.assert_allclose(np.load(out), expected, atol=1e-4)


def test_the_likeliest_classes_are_printed(tmp_path: Path, state: Path, data: LocalData, capsys: Capture) -> None:
    np.savez(tmp_path / "d.npz", x=data.x_test[:2], y=np.array([1, 0]))
    assert main.main(["predict", "--state", str(state), "--input", str(tmp_path / "d.npz"), "--top", "2"]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert [line.split()[:2] for line in lines] == [["0:", "1"], ["1:", "1"]]
    assert all(line.count(",") == 1 for line in lines)
    assert "accuracy 0.5000 on 2 samples" in output.err
    command = ["predict", "--state", str(state), "--input", str(tmp_path / "d.npz"), "--top", "2", "--json"]
    assert main.main(command) == ExitCode.OK
    rows = json.loads(capsys.readouterr().out)
    printed = [f"{r['sample']}: " + ", ".join(f"{o['class']} {o['score']:.4f}" for o in r["outputs"]) for r in rows]
    assert printed == lines


@pytest.mark.parametrize(
    ("options", "samples", "array"),
    [((), 20, "x_test"), (("--split", "train"), 70, "x_train"), (("--split", "val"), 7, "x_val")],
)
def test_a_file_that_trains_is_predicted(
    tmp_path: Path, state: Path, data: LocalData, capsys: Capture, options: tuple[str, ...], samples: int, array: str
) -> None:
    arrays = {f"{kind}_{split}": getattr(data, f"{kind}_{split}") for kind in "xy" for split in ("train", "test")}
    np.savez(tmp_path / "d.npz", **arrays, x_val=data.x_test[:7], y_val=data.y_test[:7])
    code = main.main(["predict", "--state", str(state), "--input", str(tmp_path / "d.npz"), *options])
    output = capsys.readouterr()
    assert code == ExitCode.OK, output.err
    count, report = len(output.out.splitlines()), output.err
    assert count == samples
    assert f"{array} of {tmp_path / 'd.npz'}" in report
    assert f" on {samples} samples" in report


def test_a_bundle_predicts_for_the_label_shares_of_given_data(
    tmp_path: Path, bundle: Path, weights: Tensors, data: LocalData
) -> None:
    np.savez(tmp_path / "own.npz", x=data.x_train, y=data.y_train, x_test=data.x_test, y_test=data.y_test)
    np.save(tmp_path / "x.npy", data.x_test)
    arguments = ["--bundle", str(bundle), "--input", str(tmp_path / "x.npy"), "--output", str(tmp_path / "out.npy")]
    assert main.main(["predict", *arguments, "--data", str(tmp_path / "own.npz")]) == ExitCode.OK
    plain = data.x_test @ weights["w"].T + weights["b"]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), plain + log_prior(data.y_train, 3), atol=1e-4)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [(["heat", "wind", "rain"], ["heat", "wind", "rain"]), (["heat"], ["heat +1", "heat +2", "heat +3"])],
)
def test_predicted_numbers_have_the_names_and_steps_of_their_columns(
    tmp_path: Path,
    model: Path,
    weights: Tensors,
    data: LocalData,
    capsys: Capture,
    columns: list[str],
    expected: list[str],
) -> None:
    state = serve(tmp_path / "state", model, weights, loss="mse")
    names = np.array([f"c{i}" for i in range(data.x_test.shape[1])])
    y = np.zeros((len(data.x_test), 3), np.float32)
    np.savez(tmp_path / "d.npz", x=data.x_test, y=y, columns=names, target_columns=np.array(columns))
    command = ["predict", "--state", str(state), "--input", str(tmp_path / "d.npz")]
    assert main.main([*command, "--json"]) == ExitCode.OK
    assert [output["output"] for output in json.loads(capsys.readouterr().out)[0]["outputs"]] == expected


def without_names(bundle: Path) -> Path:
    (bundle / MANIFEST).write_text(json.dumps({**json.loads((bundle / MANIFEST).read_text()), "class_names": []}))
    return bundle


def test_labels_that_are_texts_are_compared_by_the_names_of_the_option_or_the_bundle(
    tmp_path: Path, bundle: Path, data: LocalData, capsys: Capture
) -> None:
    names = np.array(["ant", "bee", "cat"])
    np.savez(tmp_path / "numbers.npz", x=data.x_train, y=data.y_train)
    np.savez(tmp_path / "texts.npz", x=data.x_train, y=names[data.y_train])
    command = ["predict", "--bundle", str(bundle), "--input"]
    numbers, texts = ([*command, str(tmp_path / file)] for file in ("numbers.npz", "texts.npz"))
    assert main.main(numbers) == ExitCode.OK
    by_number = capsys.readouterr()
    assert main.main(texts) == ExitCode.OK
    assert capsys.readouterr() == by_number
    without_names(bundle)
    assert main.main(texts) == ExitCode.DATA
    assert "--class-names" in capsys.readouterr().err
    option = ["--class-names", "ant,bee,cat"]
    assert main.main([*texts, *option]) == ExitCode.OK
    assert capsys.readouterr() == by_number
    # Label shares are those of texts, too.
    assert main.main([*texts, *option, "--data", str(tmp_path / "texts.npz")]) == ExitCode.OK
    by_text = capsys.readouterr()
    assert main.main([*numbers, *option, "--data", str(tmp_path / "numbers.npz")]) == ExitCode.OK
    assert capsys.readouterr() == by_text


def test_names_of_classes_count_in_predictions_and_stay_in_what_is_trained_with_them(
    tmp_path: Path, bundle: Path, capsys: Capture
) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "sounds"
    for n in range(18):
        path = folder / "abc"[n % 3] / f"{n}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wav(rng.integers(0, 2**15, 6).astype("<i2").tobytes()))
    nameless, out = str(without_names(bundle)), str(tmp_path / "out")
    words, option = ["--input", str(folder), "--split", "train"], ["--class-names", "a,b,c"]
    assert main.main(["predict", "--bundle", nameless, *words, *option]) == ExitCode.OK
    assert main.main(["train", "--bundle", nameless, "--data", str(folder), "--out", out, *option]) == ExitCode.OK
    assert open_bundle(out).class_names == ("a", "b", "c")
    capsys.readouterr()
    assert main.main(["predict", "--bundle", out, *words]) == ExitCode.OK
    by_folder = capsys.readouterr().out.splitlines()
    # One recording is predicted as the same one in its folder.
    assert main.main(["predict", "--bundle", out, "--input", str(folder / "a" / "0.wav")]) == ExitCode.OK
    assert capsys.readouterr().out.strip().removeprefix("0: ") in {each.partition(": ")[2] for each in by_folder}
    assert main.main(["predict", "--bundle", out, "--input", str(folder / "none.wav")]) == ExitCode.DATA
    # Names that aren't as many as the outputs can't be the model's.
    assert (
        main.main([*["train", "--bundle", out, "--data", str(folder)], "--out", out, "--class-names", "a,b,c,d"]) == 0
    )
    assert open_bundle(out).class_names == ()


def run(tmp_path: Path, *, insecure: Sequence[str] = ("--insecure",), **changes: str) -> int:
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 6), np.float32), y=np.zeros(5, int))
    values = {
        "--broker": "mqtt://127.0.0.1:9",
        "--device": "d",
        "--data": str(tmp_path / "d.npz"),
        "--state": str(tmp_path / "state"),
        **{f"--{k}": v for k, v in changes.items()},
    }
    return main.main(["run", *insecure, *(word for row in values.items() for word in row if row[1])])


class Runtime(RuntimeProcess):
    """In place of the process that loads onnxruntime: what was asked of it; `stops` is where a stop comes."""

    stops = ""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        started_runtimes.append(self)

    def check(self) -> str:
        self._note("check")
        return "1"

    def check_model(self, serving: Path | None = None) -> None:
        self._note("check_model")

    def probe(self, *_: Any, **__: Any) -> ProbeReport:
        self._note("probe")
        return ProbeReport(cores=1, memory_total=10**9, memory_available=10**8, seconds=0.0)

    def _note(self, what: str) -> None:
        self.asked.append(what)
        if what == self.stops:  # the service manager's signal ends the measuring process as well
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeUnavailableError("the probe failed (killed by signal 15)")


started_runtimes: list[Runtime] = []


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> list[Runtime]:
    """In place of the processes that check and measure: those that were started."""
    started_runtimes.clear()
    Runtime.stops = ""
    monkeypatch.setattr("fedprune_device.board.RuntimeProcess", Runtime)
    return started_runtimes


def test_parsing_options_loads_neither_numpy_nor_onnxruntime_nor_cryptography() -> None:
    code = (
        "import sys; from fedprune_device.cli.main import build_parser; "
        "build_parser().parse_args(['train', '--bundle', 'b', '--data', 'd', '--out', 'o']); "
        "print(*sorted({'numpy', 'onnxruntime', 'cryptography', 'ssl', 'paho'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_one_process_checks_a_release_on_trial_and_measures(
    tmp_path: Path, runtimes: list[Runtime], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    board = set_up(tmp_path / "board", make_release(tmp_path / "1", 1))
    board.stage(source(make_release(tmp_path / "2", 2, system=OUTSIDE)))
    board.arm()
    choose_slot(board.home, ExitStack())
    monkeypatch.setenv("FEDPRUNE_ROOT", str(board.home.root))
    for slot, asked in (("b", ["check_model", "check", "probe"]), ("a", ["check", "probe"])):
        monkeypatch.setenv("FEDPRUNE_SLOT", slot)
        assert run(tmp_path) == ExitCode.BROKER
        assert runtimes[-1].asked == asked
        assert "127.0.0.1:9" in capsys.readouterr().err
    assert len(runtimes) == 2


@pytest.mark.parametrize("child", ["check", "probe"])
def test_a_stop_during_a_measurement_is_no_crash(tmp_path: Path, runtimes: list[Runtime], child: str) -> None:
    Runtime.stops = child
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run(tmp_path) == ExitCode.OK
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "state" / "crash.json").exists()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"data": "nothing.npz"}, ExitCode.DATA),
        ({"profile": "no-such-board"}, ExitCode.PROFILE),
        ({"local": "0.0.0.0:80"}, ExitCode.CONFIG),
        ({"data": "local", "test-share": "2"}, ExitCode.CONFIG),
        ({"broker": "mqtts://x", "ca": "nothing.pem"}, ExitCode.CONFIG),
        ({"state": "/dev/null"}, ExitCode.STORAGE),
    ],
)
def test_bad_arguments_end_before_anything_is_measured_or_connected(
    tmp_path: Path, changes: dict[str, str], code: int, runtimes: list[Runtime], capsys: Capture
) -> None:
    assert run(tmp_path, insecure=() if "ca" in changes else ("--insecure",), **changes) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not any(p.asked for p in runtimes)


def test_an_onnxruntime_that_kills_processes_is_an_exit_code_also_where_a_model_serves(
    tmp_path: Path, state: Path
) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 6), np.float32), y=np.zeros(5, int))
    (tmp_path / "onnxruntime.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    words = ["run", "--insecure", "--broker", "mqtt://127.0.0.1:9", "--device", "d", "--local", "127.0.0.1:0"]
    words += ["--data", str(tmp_path / "d.npz"), "--state", str(state)]
    done = subprocess.run(
        [sys.executable, "-m", "fedprune_device.cli.main", *words],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == ExitCode.RUNTIME, "this process has not loaded it"
    assert "signal 4" in done.stderr


def test_a_password_is_never_shown(tmp_path: Path, runtimes: list[Runtime], capsys: Capture) -> None:
    run(tmp_path, broker="mqtt://me:geheim@127.0.0.1:9")
    output = capsys.readouterr()
    assert "geheim" not in output.out + output.err
