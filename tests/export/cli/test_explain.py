"""`explain`: every node has its place, costs are those of the mathematics, and nothing that was measured is lost."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn

from fedprune.core.errors import ExitCode
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Features, Recipe
from fedprune.planning import profile_store
from fedprune.planning.costs import costs_at
from fedprune.runtime import session
from fedprune.runtime.session import KernelTimes
from fedprune_export.autodiff.conv_geometry import Window
from fedprune_export.autodiff.rules.dense import formulation
from fedprune_export.cli.main import main
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.profiling import machine_peak, roofline
from fedprune_export.profiling.machine_peak import Speed
from fedprune_export.profiling.roofline_layers import KINDS, PRODUCTS, Piece, pieces
from fedprune_export.pruning.model import Model
from fedprune_export.reports.roofline_report import document
from fedprune_export.training.step_graph import training_graph
from fedprune_server.simulation.digits import digits_model

SPEED = Speed(1e9, 1e9, "of a slow machine")


@pytest.fixture(scope="module")
def model() -> Model:
    return import_onnx(digits_model(), "digits")


def found(model: Model, density: float = 1.0, batch: int = 4) -> list[Piece]:
    widths = widths_at(model.architecture, density)
    return pieces(model, training_graph(model, Features()), widths, batch)


def test_every_node_is_in_at_most_one_piece(model: Model) -> None:
    names = Counter(name for piece in found(model) for name in piece.nodes)
    assert names
    assert max(names.values()) == 1


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_multiplications_are_those_of_the_costs(model: Model, density: float) -> None:
    total = sum(piece.macs for piece in found(model, density, 4))
    assert total == 4 * costs_at(model.architecture, widths_at(model.architecture, density)).training_macs


def test_a_convolution_moves_its_values_once(model: Model) -> None:
    parts = {p.part: p for p in found(model, 0.5, 4) if p.title == "conv2"}
    weight = model.architecture.shapes(widths_at(model.architecture, 0.5))["conv2.weight"]
    layer = next(n for n in model.architecture.layers if n.weight == "conv2.weight")
    places = layer.positions
    sizes = [4 * prod(weight), 4 * 4 * weight[1] * places * layer.stride, 4 * 4 * weight[0] * places]
    assert {p.bytes for p in parts.values()} == {sum(sizes)}
    assert set(parts) == {"forward", "input gradient", "weight gradient"}


def test_forms_are_those_that_were_chosen(model: Model) -> None:
    form = {p.title: p.form for p in found(model) if p.part == "weight gradient" and p.op == "Conv"}
    layers = {n.weight.removesuffix(".weight"): n for n in model.architecture.layers if n.op == "Conv"}
    for title, layer in layers.items():
        side = round(layer.positions**0.5)
        w = Window((side, side), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), (side, side))
        assert form[title] == (formulation(w, 64).weight_gradient if side > 4 else "columns")


def explained(model: Model, runs: int = 0) -> roofline.Explanation:
    widths = widths_at(model.architecture, 0.25)
    return roofline.explain(model, widths, Recipe(), SPEED, batch=4, runs=runs)


def test_what_is_measured_is_found_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[KernelTimes] = []

    def watched(*given: object, **more: object) -> KernelTimes:
        seen.append(session.kernel_times(*given, **more))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(roofline, "kernel_times", watched)
    out = explained(model, 3)
    (times,) = seen
    whole = sum(s for op, s in times.kernels.values() if op not in ("If", "Loop"))
    told = sum(p.measured_s or 0.0 for p in out.pieces)
    assert told + out.unknown_s == pytest.approx(whole)
    assert out.step_s == times.run
    assert sum(out.shares().values()) == pytest.approx(1)
    # Only what onnxruntime put in itself may be unknown: constants, casts.
    unknown = {name for name, (op, s) in times.kernels.items() if "~" not in name and s > 1e-4 and op in PRODUCTS}
    assert not unknown
    assert out.unknown_s < 0.2 * whole


class Recurrent(nn.Module):
    """A layer that is computed in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(5, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.torch
def test_of_a_loop_what_is_inside_is_told() -> None:
    model = import_onnx(export_torch(Recurrent(), input_shape=(7, 5)), "series")
    names = [name for piece in found(model) for name in piece.nodes]
    loops = [node for node in training_graph(model, Features()).nodes if node.bodies]
    assert loops
    assert not {loop.name for loop in loops} & set(names)
    assert {node.name for loop in loops for body in loop.bodies for node in body.node} <= set(names)


def test_bounds_are_of_the_speed(model: Model) -> None:
    for p in explained(model).pieces:
        assert p.compute_s == 2 * p.piece.macs / SPEED.flops
        assert p.memory_s == p.piece.bytes / SPEED.bytes_s
        assert p.bound_s == max(p.compute_s, p.memory_s)
        assert p.binds == ("compute" if p.compute_s == p.bound_s and p.compute_s > p.memory_s else "memory")
        assert p.gap is None
        assert replace(p, measured_s=3 * p.bound_s).gap is None  # of another machine
        assert replace(p, measured_s=3 * p.bound_s, comparable=True).gap == pytest.approx(3)


def test_sub_graphs_count_once() -> None:
    piece = Piece("conv", "Conv", "weight gradient", "blocks", 1, 1, ("Conv~1", "Pad~2"))
    kernels = {"If~3": ("If", 9.0), "Conv~1": ("Conv", 5.0), "Pad~2_more": ("Pad", 3.0), "strange": ("Cast", 1.0)}
    spent, unknown = roofline._spent([piece], KernelTimes(10.0, kernels))
    assert spent == [{"products": 5.0, "layout": 3.0}]
    assert unknown == 1.0


@pytest.mark.parametrize(("threads", "share"), [(0, 1.0), (1, 0.25), (4, 1.0), (9, 1.0)])
def test_threads_have_their_share_of_a_profiles_peak(threads: int, share: float) -> None:
    profile = profile_store.find("raspberry-pi-5")
    speed = machine_peak.promised(profile, threads)
    assert speed.flops == profile.compute.peak_flops * share
    assert speed.bytes_s == profile.memory.bandwidth_bytes_s


def test_this_machine_has_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_peak, "_MOVED", 2**12)
    monkeypatch.setattr(machine_peak, "_SIDE", 16)
    speed = machine_peak.measured(2)
    assert speed.flops > 0
    assert speed.bytes_s > 0
    assert "2 threads" in speed.source


class Rows(HTMLParser):
    """Counts what a page shows."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags[tag] += 1


@pytest.mark.parametrize("runs", [0, 1])
def test_the_page_has_a_bar_and_a_row_per_piece(model: Model, runs: int) -> None:
    out = explained(model, runs)
    seen = Rows()
    seen.feed(document(out).to_html())
    assert seen.tags["li"] == len(out.pieces)
    assert seen.tags["tr"] == 1 + len(out.pieces) + (1 + len(KINDS) if runs else 0)


def test_the_command_prints_what_is_explained(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ("--target", "raspberry-pi-5", "--density", "0.5", "--batch", "4")
    assert main(["explain", str(digits), *target, "--json"]) == ExitCode.OK
    body = json.loads(capsys.readouterr().out)
    assert main(["explain", str(digits), *target]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert body["batch"] == 4
    least = 0.01 * sum(p["bound_s"] for p in body["pieces"])
    small = [p for p in body["pieces"] if p["bound_s"] < least]
    assert len(small) > 1
    assert len(lines) == 1 + len(body["pieces"]) - len(small) + 1 + 2
    assert lines[-3].startswith(f"{len(small)} others\t")
    assert f"{sum(p['macs'] for p in small):,}" in lines[-3]
    assert "gap" not in lines[0]
    assert body["bounds"]["source"] == "profile raspberry-pi-5, 1 of 4 cores"
    assert body["bound_s"] == pytest.approx(sum(p["bound_s"] for p in body["pieces"]))


def test_a_step_is_measured_and_drawn(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedprune_export.cli.explain.RUNS", 1)
    file = tmp_path / "step.html"
    options = ("--target", "raspberry-pi-5", "--density", "0.25", "--batch", "2", "--measure", "--page", str(file))
    assert main(["explain", str(digits), *options]) == ExitCode.OK
    head, *rest = capsys.readouterr().out.splitlines()
    assert head.endswith("bound\tbinds\tmeasured here")
    assert not any("times that" in line for line in rest)
    assert rest[-2].startswith("measured on this machine, which is another: ")
    assert rest[-1].startswith("spent on: ")
    assert file.read_text().startswith("<!doctype html>")


def test_by_this_machine_s_bounds_what_was_measured_has_a_ratio(
    digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedprune_export.cli.explain.RUNS", 1)
    monkeypatch.setattr(machine_peak, "_MOVED", 2**12)
    monkeypatch.setattr(machine_peak, "_SIDE", 16)
    assert main(["explain", str(digits), "--density", "0.25", "--batch", "2", "--measure"]) == ExitCode.OK
    head, *rest = capsys.readouterr().out.splitlines()
    assert head.endswith("measured\tgap")
    assert rest[-2].endswith(" times that")


def test_a_page_is_a_page(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.txt"
    assert main(["explain", str(digits), "--page", str(file)]) == ExitCode.USAGE
    assert "--page: expected a file name that ends in .html, got" in capsys.readouterr().err
    assert not file.exists()


def test_an_export_explains_its_step(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--target", "raspberry-pi-5", "--density", "0.25", "--out", str(tmp_path / "b"), "--explain")
    assert main([str(digits), *options, "--json"]) == ExitCode.OK
    body = json.loads(capsys.readouterr().out)
    assert body["explanation"]["widths"] == [g["kept"] for g in body["groups"]]
    assert body["explanation"]["batch"] == Recipe().micro_batch
    assert "all of 4 cores" in body["explanation"]["bounds"]["source"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--target", "toaster"), ExitCode.PROFILE),
        (("--density", "0"), ExitCode.USAGE),
        (("--page", "/nowhere/at/all.html"), ExitCode.STORAGE),
    ],
)
def test_strange_options_end_with_their_code(digits: Path, words: tuple[str, ...], code: ExitCode) -> None:
    target = () if "--target" in words else ("--target", "raspberry-pi-5")
    assert ended(["explain", str(digits), *target, *words]) == code


def ended(words: list[str]) -> int:
    """The exit code of a command line, which may be no command at all."""
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)


def test_one_board_at_a_time_is_explained(digits: Path, tmp_path: Path) -> None:
    options = ("--target", "raspberry-pi-5,raspberry-pi-4b", "--out", str(tmp_path / "b"), "--explain")
    assert main([str(digits), *options]) == ExitCode.USAGE
