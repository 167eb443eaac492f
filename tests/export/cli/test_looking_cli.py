"""`groups` and `operators`: what people and programs read about a model, and about what can be handled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune_export.autodiff.tape import RULES as GRADIENTS
from fedprune_export.channels.rule import RULES as CHANNELS
from fedprune_export.cli.main import main
from fedprune_export.importing import import_onnx
from fedprune_export.importing.control_flow import CONTROL_FLOW
from fedprune_export.importing.sequences import SEQUENCE_OPERATORS
from fedprune_export.importing.translation import TRANSLATED
from fedprune_export.ir.composites import NATIVE
from fedprune_export.ir.opset_lowering import EARLIER_FORMS, LATER_FORMS


def test_groups_are_printed_with_what_stays(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["groups", str(digits)]) == ExitCode.OK
    assert capsys.readouterr().out.splitlines() == [
        "g0: 32 channels: conv1.weight[0], bn1.*, conv2.weight[1]",
        "g1: 64 channels: conv2.weight[0], bn2.*, conv3.weight[1]",
        "g2: 128 channels: conv3.weight[0], bn3.*, fc.weight[1]",
        "stays: fc.weight[0] (10), fc.bias[0] (10)",
        "why: inputs and outputs of a model stay; notes name what else keeps channels",
    ]


def test_groups_as_json_are_the_architecture(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["groups", str(digits), "--json"])
    body = json.loads(capsys.readouterr().out)
    architecture = import_onnx(digits.read_bytes(), "digits").architecture
    assert body["digest"] == architecture.digest
    assert [(g["name"], g["channels"], tuple(g["members"])) for g in body["groups"]] == [
        (g.name, g.size, architecture.members(i)) for i, g in enumerate(architecture.groups)
    ]
    assert body["stays"] == [{"place": "fc.weight[0]", "indices": 10}, {"place": "fc.bias[0]", "indices": 10}]


def test_what_keeps_channels_is_named(
    digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(CHANNELS, "Relu")
    assert main(["groups", str(digits)]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "conv1.weight[0] (32)" in out
    assert "keeps channels\nnote: Operator Relu" in out


def test_every_rule_is_listed_with_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["operators", "--json"]) == ExitCode.OK
    rows = {r["operator"]: r for r in json.loads(capsys.readouterr().out)}
    assert {n for n, r in rows.items() if r["channels"]} == set(CHANNELS)
    assert {n for n, r in rows.items() if r["gradient"]} == set(GRADIENTS)
    assert list(rows) == sorted(rows)
    for row in rows.values():
        for said in (row["channels"], row["gradient"], row["forms"]):
            assert said is None or (said.strip() and "\n" not in said)


def test_forms_are_named_for_what_the_import_and_the_writer_change(capsys: pytest.CaptureFixture[str]) -> None:
    main(["operators", "--json"])
    forms = {r["operator"]: r["forms"] for r in json.loads(capsys.readouterr().out) if r["forms"]}
    assert {*TRANSLATED, *CONTROL_FLOW, *SEQUENCE_OPERATORS, *NATIVE, *LATER_FORMS, *EARLIER_FORMS} == set(forms)
    for name, since in NATIVE.items():
        assert f"below opset {since}" in forms[name]
    for name, since in (*LATER_FORMS.items(), *EARLIER_FORMS.items()):
        assert f"from opset {since} on" in forms[name]


def test_the_table_of_operators_has_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["operators"]) == ExitCode.OK
    header, *rows = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert header == ["operator", "channels", "gradient", "forms"]
    assert {r[0] for r in rows} >= {*CHANNELS, *GRADIENTS}
    assert {len(r) for r in rows} == {4}


@pytest.mark.parametrize("command", ["groups", "operators", "verify", "to-onnx", "to-torch", "profiles"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: fedprune-export {command}")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"\n  {command} " in capsys.readouterr().out
