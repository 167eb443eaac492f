"""The benchmark of a GPU, where there is none: a machine that is lent for minutes must not find its faults."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.paths import ROOT

pytestmark = [pytest.mark.system, pytest.mark.torch]

COMMAND = [sys.executable, "-m", "benchmarks.gpu"]


def dry_rows(*parts: str) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """The rows of parts by their names, and what was said on stderr."""
    chosen = [word for part in parts for word in ("--part", part)]
    done = subprocess.run(
        [*COMMAND, "--dry", *chosen], capture_output=True, text=True, check=True, timeout=300, cwd=ROOT
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in done.stdout.splitlines():
        row = json.loads(line)
        rows.setdefault(row.pop("part"), []).append(row)
    return rows, done.stderr


def test_a_dry_run_trains_and_predicts_and_says_what_it_skips() -> None:
    rows, said = dry_rows("rows", "predictions", "engines")
    (step,) = rows["rows"]
    assert set(step["ms"]) == set(step["verdicts"]) == {"ours", "unrecorded", "torch"}
    assert step["verdicts"]["torch"]["ok"]
    assert step["placement"]["work"]["Conv"] == 4
    assert [row["precision"] for row in rows["predictions"]] == ["float32", "float16", "int8"]
    assert "engines" not in rows
    assert "skipped: engines" in said


@pytest.mark.soak
def test_a_dry_run_goes_through_rounds_of_real_programs_and_a_fleet() -> None:
    rows, _ = dry_rows("board", "fleet")
    (board,), (fleet,) = rows["board"], rows["fleet"]
    assert (board["rounds"], len(board["step_ms"])) == (1, 1)
    assert (fleet["devices"], fleet["ok"]) == (2, True)


@pytest.mark.soak
def test_a_board_that_trains_on_its_processor_instead_of_the_gpu_fails_the_check() -> None:
    from benchmarks.gpu.board import CUDA_TIER, board_row
    from benchmarks.gpu.machine import Machine

    row = board_row(Machine(dry=True, end=0.0), CUDA_TIER)
    assert row["rounds"] == 1
    assert "has no CUDA provider" in row["fell_back"][0]
    assert not row["ok"]


@pytest.mark.soak
def test_a_fleet_that_trains_on_the_processor_instead_of_the_gpu_fails_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks.gpu import fleet
    from benchmarks.gpu.machine import Machine

    monkeypatch.setattr(fleet, "SIMULATE", [*fleet.SIMULATE, "--cuda"])
    (row,) = fleet.measure_fleet(Machine(dry=True, end=float("inf")))
    assert row["fell_back"]
    assert not row["ok"]


def test_a_machine_without_a_gpu_is_told_what_it_lacks() -> None:
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this machine lacks")


def test_a_wrong_kernel_is_told_from_rounding() -> None:
    from benchmarks.gpu.rounding import judge, processor_traces, torch_trace
    from benchmarks.measured_steps import batch
    from benchmarks.step_nets import network
    from fedprune.model.architecture import widths_at
    from fedprune.model.features import Features
    from fedprune.model.selection import Selection
    from fedprune.planning.probe_report import CUDA
    from fedprune.runtime.session import OnnxSession
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_export.training.step_graph import training_graph

    model = import_onnx(export_torch(network("lenet")), "lenet")
    tensors = Selection.of(model.architecture, widths_at(model.architecture, 0.25)).gather(model.tensors)
    x, y = batch(model.architecture.input_shape)
    session = OnnxSession(training_graph(model, Features(), CUDA).to_bytes(), training=True)
    exact = torch_trace("lenet", tensors, x, y, exact=True)
    torchs, ours, nudged = processor_traces("lenet", session, tensors, x, y)

    assert judge(ours, exact, [torchs, nudged])["ok"]

    def changed(field: str, step: int, change: Callable[[Any], Any]) -> Any:
        losses = getattr(ours, field).copy()
        losses[step:] = change(losses[step:])
        return judge(replace(ours, **{field: losses}), exact, [torchs, nudged])

    lacks_a_row = ours.state["7.weight"].copy()
    lacks_a_row[np.linalg.norm(lacks_a_row, axis=1).argmax()] = 0
    first = next(iter(exact.state))
    for name, value in ((first, 1.04 * ours.state[first]), ("7.weight", lacks_a_row)):
        verdict = judge(replace(ours, state={**ours.state, name: value}), exact, [torchs, nudged])
        assert (verdict["ok"], verdict["tensor"]) == (False, name)
    assert not changed("still", 0, lambda losses: losses * (1 + 1e-4))["ok"], "what TF32 does"
    assert not changed("still", 6, lambda _: ours.still[5])["ok"], "a replay of what was read before"
    assert not changed("moving", 1, lambda _: ours.moving[0])["ok"], "no update"
    assert changed("moving", 4, lambda _: np.nan)["moving"] == float("inf")


def test_outputs_of_int8_are_held_to_the_processors_of_the_same_file() -> None:
    from benchmarks.gpu.predictions import judge_outputs

    float32 = np.linspace(-1, 1, 40).reshape(4, 10)
    same_file = float32 + 0.01
    oks = {p: judge_outputs(p, same_file + 0.008, same_file, float32)["ok"] for p in ("float32", "float16", "int8")}
    assert oks == {"float32": False, "float16": True, "int8": False}
    assert judge_outputs("int8", same_file - 0.004, same_file, float32)["ok"]


def test_shapes_left_to_the_processor_are_not_work() -> None:
    from benchmarks.gpu.placement import count_nodes

    def node(name: str, provider: str, kind: str, shape: list[int]) -> dict[str, Any]:
        output = {"output_type_shape": [{kind: shape}], "output_size": "64"}
        return {"op_name": name, "provider": f"{provider}ExecutionProvider", "microseconds": 3, **output}

    counts = count_nodes(
        [
            node("Conv", "CUDA", "float", [32, 8, 4, 4]),
            node("Mul", "CPU", "int64", [4]),
            node("Mul", "CPU", "float", []),
            node("OneHot", "CPU", "int64", [32, 10]),
            node("MemcpyToHost", "CUDA", "float", [32, 10]),
        ]
    )
    assert counts["shapes"] == {"Mul": 1}
    assert counts["work"] == {"Mul": 1, "OneHot": 1}
    assert (counts["copies"], counts["copied_bytes"]) == ({"MemcpyToHost": 1}, 64)


def test_a_part_that_fails_loses_no_other_parts_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import harness
    from benchmarks.gpu import __main__ as command
    from benchmarks.gpu.machine import Machine

    def broken(machine: Machine) -> Iterator[dict[str, Any]]:
        raise RuntimeError("CUDA failure 700")
        yield {}

    def slow(machine: Machine) -> Iterator[dict[str, Any]]:
        for name in machine.in_time(["lenet", "vgg"], 1.0):
            yield {"net": name, "density": 0.5, "ok": False}
            machine.end = 0.0

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "results" / "gpu.md", results)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", results)
    monkeypatch.setattr(command, "PARTS", {"rows": broken, "predictions": slow})
    machine = Machine(dry=True, end=float("inf"))
    assert command.run_parts(machine, ["rows", "predictions"], lambda body: harness.save("gpu", body)) == 1
    written = json.loads((results / "gpu.json").read_text())
    assert (written["rows"], len(written["predictions"])) == ([], 1)
    assert written["failed"] == ["rows (RuntimeError: CUDA failure 700)", "predictions: lenet 0.5"]
    assert written["skipped"] == ["vgg (no time left)"]
    assert "- vgg (no time left)" in (results / "gpu.md").read_text()


def test_a_run_that_measured_nothing_fails() -> None:
    from benchmarks.gpu.__main__ import run_parts
    from benchmarks.gpu.machine import Machine

    assert run_parts(Machine(dry=True, end=0.0), ["engines"], lambda body: None) == 1


def test_checks_of_engines_are_rows() -> None:
    from benchmarks.gpu.engines import acceptance_rows

    rows = acceptance_rows("ok    build: build in 3 s\nlog\nFAIL  damage: no: way\n1 of 2 checks passed\n")
    assert rows == [
        {"check": "build", "result": "build in 3 s", "ok": True},
        {"check": "damage", "result": "no: way", "ok": False},
    ]
    assert acceptance_rows("error: no TensorRT")[0]["ok"] is False
