"""`bench`: what is measured, for which batches and threads, and what stands beside it; how long it took is no test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode, ModelError
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune.planning.cost_prediction import predict
from fedprune.runtime.bundle import WEIGHTS, open_bundle
from fedprune_export.cli.main import main
from fedprune_export.profiling.benchmark import Stopwatch
from fedprune_server.simulation.digits import digits_model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    (folder / "digits.onnx").write_bytes(digits_model())
    out = folder / "b"
    options = ("--target", "raspberry-pi-5", "--density", "0.25", "--set", "batch_size=8")
    assert main([str(folder / "digits.onnx"), *options, "--out", str(out)]) == ExitCode.OK
    return out


def test_the_recipe_says_what_is_measured(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(bundle), "--runs", "4", "--target", "raspberry-pi-5", "--json"]) == ExitCode.OK
    body = json.loads(capsys.readouterr().out)
    rows = body["measured"]
    assert [(r["what"], r["batch"], r["threads"], r["runs"]) for r in rows] == [
        ("training step", 8, 1, 4),
        ("prediction", 1, 1, 4),
        ("prediction", 8, 1, 4),
    ]
    for row in rows:
        seconds = row["seconds"]
        assert 0 < seconds["lower_quartile"] <= seconds["median"] <= seconds["upper_quartile"]
        assert row["peak_bytes"] > (bundle / WEIGHTS).stat().st_size
    opened = open_bundle(bundle)
    said = predict(
        opened.architecture, opened.selection.widths, profile_store.find("raspberry-pi-5"), Recipe(batch_size=8), 8
    )
    assert rows[0]["predicted"] == {"seconds": said.step_s, "peak_bytes": said.memory_bytes}
    assert rows[1]["predicted"] == {"seconds": said.latency_s, "peak_bytes": said.inference_bytes}
    assert rows[2]["predicted"] == {"seconds": None, "peak_bytes": None}


def test_batches_and_threads_are_chosen(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(bundle), "--runs", "1", "--batch", "2,3", "--threads", "1,2"]) == ExitCode.OK
    header, *rows = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert header[:3] == ["what", "batch", "threads"]
    assert not any("predicted" in title for title in header)
    assert [tuple(r[:3]) for r in rows] == [
        (what, batch, threads) for threads in "12" for what in ("training step", "prediction") for batch in "23"
    ]


def test_a_graph_that_does_not_run_is_one_line(bundle: Path) -> None:
    watch = Stopwatch(open_bundle(bundle), 1)
    with pytest.raises(ModelError, match="can't be timed"):
        watch._measured("prediction", bundle / "architecture.json", {}, 1, 1)


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [
        ("--target", "toaster", ExitCode.PROFILE),
        ("--batch", "0", None),
        ("--threads", "a", None),
        ("--runs", "0", None),
    ],
)
def test_strange_options(
    bundle: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, code: ExitCode | None
) -> None:
    if code is None:
        with pytest.raises(SystemExit) as caught:
            main(["bench", str(bundle), option, value])
        assert caught.value.code == ExitCode.USAGE
    else:
        assert main(["bench", str(bundle), option, value]) == code
    assert value in capsys.readouterr().err


def test_what_is_no_bundle(tmp_path: Path) -> None:
    assert main(["bench", str(tmp_path)]) == ExitCode.BUNDLE
