"""The Python API: what `fedprune-export` does, in three calls."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fedprune_export as fx
from fedprune.core.errors import ConfigError, ModelError
from fedprune.runtime.bundle import FILES, open_bundle
from fedprune_export.cli.main import main
from support.nets import published_nets as zoo

BOARD = "raspberry-pi-4b"


def test_a_bundle_of_the_api_is_that_of_the_command(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fx.load(digits)
    plan = fx.plan(model, BOARD, bytes_per_round=100_000)
    report = fx.export(model, plan, tmp_path / "api")
    assert main([str(digits), "--target", BOARD, "--bytes-per-round", "100000", "--out", str(tmp_path / "cli")]) == 0
    printed = capsys.readouterr().out.replace(str(tmp_path / "cli"), str(tmp_path / "api"))
    assert printed == f"{report}\n"
    assert str(plan) in printed
    assert repr(plan) == str(plan)
    assert repr(model) == "Model(digits: [1, 8, 8] to [10], 17 tensors, 3 channel groups)"
    for name in FILES:
        assert (tmp_path / "api" / name).read_bytes() == (tmp_path / "cli" / name).read_bytes()
    assert open_bundle(tmp_path / "api").selection.widths == plan.widths
    assert json.loads((tmp_path / "api" / "report.json").read_text()) == report.to_dict()


@pytest.mark.torch
def test_a_torch_module_is_loaded_as_it_is(tmp_path: Path) -> None:
    model = fx.load(zoo.make("lenet"), name="lenet")
    assert model.architecture.digest == fx.load("support.nets.small_nets:lenet").architecture.digest
    assert fx.load(zoo.make("lenet")).architecture.name == type(zoo.make("lenet")).__name__
    assert fx.cut(model, fx.export(model, fx.plan(model, BOARD, density=0.5), tmp_path).selection).nodes


def test_groups_print_as_the_command_prints_them(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = fx.load(digits).groups
    assert main(["groups", str(digits)]) == 0
    assert capsys.readouterr().out == f"{groups}\n" == f"{groups!r}\n"
    assert [g.size for g in groups] == [g["channels"] for g in groups.to_dict()["groups"]]
    assert len(groups) == len(groups[:]) > 1


def test_data_of_another_label_kind_is_read_for_the_recipes_loss(digits: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=random.random((4, 1, 8, 8), np.float32), y=random.integers(0, 10, 4))
    model = fx.load(digits)
    assert fx.export(model, fx.plan(model, BOARD), tmp_path / "b", data=tmp_path / "d.npz").accuracy.samples == 4


UNRELATED_FILE = Path(__file__)
WRONG: dict[str, tuple[str, str, dict[str, object]]] = {
    "no shape": ("load", "input_shape", {"input_shape": 3}),
    "number for a name": ("load", "name", {"name": 3}),
    "model of text": ("plan", "model", {"model": "digits.onnx"}),
    "recipe of text": ("plan", "recipe", {"recipe": "sgd"}),
    "density of text": ("plan", "density", {"density": "half"}),
    "deadline": ("plan", "deadline_s", {"deadline_s": float("nan")}),
    "model that is no model": ("export", "model", {"model": UNRELATED_FILE}),
    "plan that is a name": ("export", "plan", {"plan": BOARD}),
    "data": ("export", "data", {"data": 3}),
    "numbers of classes": ("export", "class_names: an entry", {"class_names": [1, 2]}),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_of_another_type_are_named_with_what_was_expected(digits: Path, tmp_path: Path, case: str) -> None:
    call, named, wrong = WRONG[case]
    arguments: dict[str, object] = {}
    if call == "load":
        arguments["source"] = digits
    else:
        arguments["model"] = model = fx.load(digits)
        arguments |= {"target": BOARD} if call == "plan" else {"plan": fx.plan(model, BOARD), "folder": tmp_path / "b"}
    with pytest.raises((ConfigError, ModelError), match=rf"{named}.*: expected .*") as error:
        getattr(fx, call)(**arguments | wrong)
    assert "got" in str(error.value) or case == "scorer"
    assert not (tmp_path / "b").exists()


@pytest.mark.system
def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import fedprune_export, sys; print([m for m in ('numpy', 'onnx', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_is_there_and_others_are_not() -> None:
    assert all(getattr(fx, name) is not None for name in fx.__all__)
    assert set(fx.__all__) <= set(dir(fx))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fx.nothing  # noqa: B018
