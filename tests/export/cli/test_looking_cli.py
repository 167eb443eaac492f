"""`groups` and `operators`: what people and programs read about a model, and about what can be handled."""

import json
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune_export.autodiff.tape import RULES as GRADIENTS
from fedprune_export.channels.rule import RULES as CHANNELS
from fedprune_export.cli.main import main
from fedprune_export.importing import import_onnx


def test_groups_as_json_are_the_architecture(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["groups", str(digits), "--json"])
    body = json.loads(capsys.readouterr().out)
    architecture = import_onnx(digits.read_bytes(), "digits").architecture
    assert body["digest"] == architecture.digest
    assert [(g["name"], g["channels"], tuple(g["members"])) for g in body["groups"]] == [
        (g.name, g.size, architecture.members(i)) for i, g in enumerate(architecture.groups)
    ]
    assert body["stays"] == [{"place": "fc.weight[0]", "indices": 10}, {"place": "fc.bias[0]", "indices": 10}]


def test_every_rule_is_listed_with_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["operators", "--json"]) == ExitCode.OK
    rows = {r["operator"]: r for r in json.loads(capsys.readouterr().out)}
    assert {n for n, r in rows.items() if r["channels"]} == set(CHANNELS)
    assert {n for n, r in rows.items() if r["gradient"]} == set(GRADIENTS)
    assert list(rows) == sorted(rows)
    for row in rows.values():
        for text in (row["channels"], row["gradient"], row["forms"]):
            assert text is None or (text.strip() and "\n" not in text)
