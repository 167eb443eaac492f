"""`fedprune-export` from the outside: bundles, reports, and one line per failure."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune.planning import profile_store
from fedprune.runtime.bundle import FILES, MANIFEST, open_bundle
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_export.cli.main import main
from fedprune_export.importing import read_source

pytestmark = pytest.mark.torch


REPORTS = ("report.html", "report.json", "report.md")


@pytest.fixture(scope="module")
def lenet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "lenet.onnx"
    path.write_bytes(read_source("support.nets.small_nets:lenet"))
    return path


def export(model: object, out: Path, *words: str, target: str = "raspberry-pi-5") -> int:
    return main([str(model), "--target", target, "--out", str(out), *words])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_an_export_writes_a_bundle(lenet_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(lenet_file, tmp_path / "b", "--density", "0.5") == ExitCode.OK
    bundle = open_bundle(tmp_path / "b")
    assert bundle.selection.widths == (3, 8, 60, 42)
    assert bundle.target == "raspberry-pi-5"
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == sorted([*FILES, MANIFEST, *REPORTS])
    parameter_count = (3 * 25 + 3) + (8 * 3 * 25 + 8) + (60 * 8 * 16 + 60) + (42 * 60 + 42) + (10 * 42 + 10)
    output = capsys.readouterr().out
    assert f"44,426 -> {parameter_count:,}" in output
    assert "replaced" not in output
    assert export(lenet_file, tmp_path / "b", "--density", "0.5") == ExitCode.OK
    assert f"replaced: the bundle that was in {tmp_path / 'b'}\n" in capsys.readouterr().out


def test_a_board_with_tensorrt_gets_a_plan_for_its_engine(lenet_file: Path, tmp_path: Path) -> None:
    assert export(lenet_file, tmp_path / "b", "--density", "0.5", target="jetson-orin-nano") == ExitCode.OK
    assert open_bundle(tmp_path / "b").engine == EnginePlan()
    assert {p.name for p in (tmp_path / "b").iterdir()} == {*FILES, MANIFEST, *REPORTS, "engine.json"}


def test_another_boards_bundle_is_refused_before_the_model_is_read(
    lenet_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(lenet_file, tmp_path / "b") == ExitCode.OK
    capsys.readouterr()
    assert export("no-such-model", tmp_path / "b", target="raspberry-pi-4b") == ExitCode.BUNDLE
    assert "expected one of raspberry-pi-4b, got one of 'raspberry-pi-5'" in one_line(capsys)


def test_a_torch_factory_gives_the_same_bundle(lenet_file: Path, tmp_path: Path) -> None:
    assert export(lenet_file, tmp_path / "file") == ExitCode.OK
    assert export("support.nets.small_nets:lenet", tmp_path / "factory") == ExitCode.OK
    for name in FILES:
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "factory" / name).read_bytes()


def test_the_planner_cuts_until_a_round_fits(lenet_file: Path, tmp_path: Path) -> None:
    assert export(lenet_file, tmp_path / "b", "--bytes-per-round", "100000") == ExitCode.OK
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert report["plan"]["bound"] == "bytes"
    assert 2 * (tmp_path / "b" / "weights.safetensors").stat().st_size <= 100000
    assert report["parity"]["max_relative_error"] < 1e-5


def test_a_board_with_little_memory_gets_parts_of_a_batch(
    lenet_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = ("--set", "batch_size=256", "--samples", "256")
    board = profile_store.find_profile("raspberry-pi-5")
    memory = replace(board.memory, total_bytes=1110 * 10**6, reserve_bytes=10**9, training_share=1.0)
    (tmp_path / "small.json").write_text(replace(board, memory=memory).to_json())
    assert export(lenet_file, tmp_path / "b", *batches, target=str(tmp_path / "small.json")) == ExitCode.OK
    output = capsys.readouterr().out
    bundle, plan = open_bundle(tmp_path / "b"), json.loads((tmp_path / "b" / "report.json").read_text())["plan"]
    assert plan["density"] == 1
    assert plan["accumulate"] == bundle.recipe.accumulate > 1
    assert sum(plan["prediction"]["memory"].values()) == plan["prediction"]["memory_bytes"] <= 110 * 10**6
    assert f"(accumulate = {bundle.recipe.accumulate})" in output
    assert "weights and optimiser state" in output
    assert b"::sum" in (tmp_path / "b" / "training.onnx").read_bytes()
    assert main(["verify", str(tmp_path / "b")]) == ExitCode.OK


def test_the_report_counts_what_is_on_disk(lenet_file: Path, tmp_path: Path) -> None:
    export(lenet_file, tmp_path / "b", "--density", "0.5")
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert report["after"]["weights_bytes"] == (tmp_path / "b" / "weights.safetensors").stat().st_size
    assert report["files"] == {n: (tmp_path / "b" / n).stat().st_size for n in FILES}
    assert (tmp_path / "b" / "report.md").read_text().startswith("# lenet for raspberry-pi-5")


@pytest.mark.parametrize(
    ("model", "words", "code", "message"),
    [
        ("none.onnx", (), ExitCode.MODEL, "No such file"),
        ("", ("--target", "toaster"), ExitCode.PROFILE, "toaster"),
        ("", ("--deadline", "1e-6"), ExitCode.PLAN, "--deadline "),
        ("", ("--input-shape", "3,28,28"), ExitCode.MODEL, "expected [1, 28, 28], got [3, 28, 28]"),
    ],
)
def test_what_can_not_be_exported_is_one_line(
    lenet_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    words: tuple[str, ...],
    code: ExitCode,
    message: str,
) -> None:
    target = ["--target", "raspberry-pi-5"] if "--target" not in words else []
    assert main([model or str(lenet_file), *target, "--out", str(tmp_path / "b"), *words]) == code
    assert message in one_line(capsys)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("word", ["verfy", "inspect"])
def test_a_first_word_that_is_neither_command_nor_model_is_named(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word, "bundle"]) == ExitCode.USAGE
    assert f"no command {word}" in one_line(capsys)


def without(package: str, model: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """An export in a process that doesn't have a package."""
    words = [str(model), "--target", "raspberry-pi-5", "--out", str(out)]
    code = f"import sys\nsys.modules[{package!r}] = None\n"
    code += f"from fedprune_export.cli.main import main\nsys.exit(main({words!r}))\n"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.system
def test_an_onnx_file_is_exported_without_importing_torch(lenet_file: Path, tmp_path: Path) -> None:
    done = without("torch", lenet_file, tmp_path / "b")
    assert (done.returncode, done.stderr) == (0, "")
