"""Flags of the command line: what they make of recipe and model, and how they end where they make no sense."""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fedprune.core.errors import ExitCode
from fedprune.model.recipe import Recipe
from fedprune.planning.probe_report import ProbeReport
from fedprune.runtime.bundle import open_bundle
from fedprune.runtime.session import OnnxSession
from fedprune_export.cli.main import build_parser, command_parsers, main
from fedprune_export.cli.options import add_recipe_options, read_recipe
from fedprune_export.model_options import ImportChoices, add_model_options


def recipe(*words: str) -> Recipe:
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    add_recipe_options(parser)
    return read_recipe(parser.parse_args(list(words)))


def file(folder: Path, body: dict[str, Any]) -> str:
    (folder / "recipe.json").write_text(json.dumps(body))
    return str(folder / "recipe.json")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--loss", "huber", "--huber-delta", "0.5"), Recipe(loss="huber", huber_delta=0.5)),
        (("--labels", "multi"), Recipe(loss="bce")),
        (("--labels", "values", "--loss", "distill"), Recipe(loss="distill")),
        (("--freeze", "a.*", "--freeze", "*.bias"), Recipe(frozen=("a.*", "*.bias"))),
        (("--set", "ordered_dropout=0.25,0.5"), Recipe(ordered_dropout=(0.25, 0.5))),
        (
            ("--set", "logit_adjustment=true", "--set", 'trainable=["fc.*"]'),
            Recipe(logit_adjustment=True, trainable=("fc.*",)),
        ),
    ],
)
def test_flags_are_settings_of_the_recipe(words: tuple[str, ...], expected: Recipe) -> None:
    assert recipe(*words) == expected


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = file(tmp_path, {"loss": "mse", "lr": 0.2, "frozen": ["a.*"], "epochs": 3})
    assert recipe("--recipe", path) == Recipe(loss="mse", lr=0.2, frozen=("a.*",), epochs=3)
    merged = recipe("--recipe", path, "--loss", "huber", "--freeze", "b.*", "--set", "lr=0.4")
    assert merged == Recipe(loss="huber", lr=0.4, frozen=("b.*",), epochs=3)


def export(model: Path, out: Path, *words: str) -> int:
    return main([str(model), "--target", "raspberry-pi-5", "--density", "0.5", "--out", str(out), *words])


def test_the_bundle_holds_the_recipe_of_the_flags(digits: Path, tmp_path: Path) -> None:
    flags = ("--loss", "mse", "--freeze", "conv1.*", "--set", "lr=0.125")
    assert export(digits, tmp_path / "b", *flags) == ExitCode.OK
    assert open_bundle(tmp_path / "b").recipe == Recipe(loss="mse", frozen=("conv1.*",), lr=0.125)
    outputs = OnnxSession(tmp_path / "b" / "training.onnx", training=True).outputs
    assert "conv2.weight::next" in outputs
    assert "conv1.weight::next" not in outputs


def test_the_inference_graph_is_written_at_the_opset_that_is_asked_for(digits: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    logits = []
    for opset in (13, 17, 21):
        assert export(digits, tmp_path / str(opset), "--opset", str(opset)) == ExitCode.OK
        graph = tmp_path / str(opset) / "inference.onnx"
        assert [o.version for o in onnx.load(graph, load_external_data=False).opset_import] == [opset]
        assert main(["verify", str(tmp_path / str(opset))]) == ExitCode.OK
        logits.append(OnnxSession(graph).run({"x": x})["logits"])
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits[2], logits[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["conv1.weight\n# a remark\n\nconv3.weight\n", '["conv1.weight", "conv3.weight"]'])
def test_a_model_ends_and_trains_where_it_is_said(digits: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    features = onnx.load(digits).graph.node[-1].input[0]
    options = ("--output", features, "--parameters", str(tmp_path / "names.txt"), "--loss", "mse")
    assert export(digits, tmp_path / "b", *options) == ExitCode.OK
    architecture = open_bundle(tmp_path / "b").architecture
    assert architecture.output_shape == (128,)
    assert [t.name for t in architecture.trainable] == ["conv1.weight", "conv3.weight"]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("none.such\n", ExitCode.MODEL, "none.such"),
        ("[1, 2]", ExitCode.CONFIG, "a list of tensor names"),
        (None, ExitCode.CONFIG, "can't read"),
    ],
)
def test_parameters_that_can_not_be_used(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, code: ExitCode, message: str
) -> None:
    if text is not None:
        (tmp_path / "names.txt").write_text(text)
    assert export(digits, tmp_path / "b", "--parameters", str(tmp_path / "names.txt")) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--set", "speed=1"), ExitCode.CONFIG, "recipe.speed: unknown key"),
        (("--freeze", "nothing.*"), ExitCode.CONFIG, "no tensor is called 'nothing.*'"),
        (("--freeze", "*"), ExitCode.CONFIG, "every tensor is frozen"),
        (("--loss", "crossentropy"), ExitCode.USAGE, "did you mean 'cross_entropy'?"),
        (("--loss", "bce", "--labels", "classes"), ExitCode.USAGE, "labels of another kind"),
        (("--opset", "12"), ExitCode.MODEL, "expected 13 to 23, got 12"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    code: ExitCode,
    message: str,
) -> None:
    assert export(digits, tmp_path / "b", *words) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("target", "code"),
    [("raspberry-pi-5", ExitCode.PROFILE), ("jetson-orin-nano", ExitCode.OK), ("generic-x86-64", ExitCode.OK)],
)
def test_a_probe_of_a_gpu_is_of_a_board_that_may_have_one(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, code: ExitCode
) -> None:
    (tmp_path / "probe.json").write_text(json.dumps(ProbeReport(4, 8 * 10**9, 7 * 10**9, 1.0, unit="cuda").to_dict()))
    options = ("--target", target, "--out", str(tmp_path / "b"), "--probe", str(tmp_path / "probe.json"))
    assert main([str(digits), *options]) == code
    message = (
        "the probe was measured on another board: expected unit cpu: raspberry-pi-5 has no GPU that trains, got cuda"
    )
    assert (message in capsys.readouterr().err) is (code != ExitCode.OK)


def test_a_probe_beats_the_profile(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A board that measured next to no memory gets a narrower model, or none."""
    body = ProbeReport(cores=4, memory_total=4 * 10**9, memory_available=2 * 10**9, seconds=1.0).to_dict()
    small = {**body, "memory_available": 10**6}
    (tmp_path / "good.json").write_text(json.dumps(body))
    (tmp_path / "small.json").write_text(json.dumps(small))
    (tmp_path / "bad.json").write_text("{}")
    assert export(digits, tmp_path / "b", "--probe", str(tmp_path / "good.json")) == ExitCode.OK
    assert export(digits, tmp_path / "s", "--probe", str(tmp_path / "small.json")) == ExitCode.PLAN
    assert export(digits, tmp_path / "s", "--probe", str(tmp_path / "bad.json")) == ExitCode.PROFILE
    assert "bad.json" in capsys.readouterr().err.splitlines()[-1]
    two = ("--target", "raspberry-pi-4b", "--probe", str(tmp_path / "good.json"))
    assert export(digits, tmp_path / "s", *two) == ExitCode.USAGE


def test_every_command_that_takes_a_model_has_all_its_options() -> None:
    options = {f"--{choice.name.replace('_', '-')}" for choice in fields(ImportChoices)}
    commands = command_parsers()
    for parser in (build_parser(), *(commands[name] for name in ("groups", "verify", "to-onnx", "to-torch"))):
        assert options <= parser.option_names(), parser.prog
