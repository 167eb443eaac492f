"""Several boards at once: a folder each, and one that a model doesn't fit keeps nothing from the others."""

import gc
import importlib
import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from fedprune.core.errors import ExitCode
from fedprune.planning import profile_store
from fedprune.runtime.bundle import FILES, MANIFEST, open_bundle
from fedprune_export.cli.main import main


def manifest_without_reports(bundle: Path) -> dict[str, Any]:
    """A bundle's manifest, but for the reports, which have the minute of their making."""
    manifest: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())
    return {**manifest, "files": {n: row for n, row in manifest["files"].items() if not n.startswith("report.")}}


def test_every_target_gets_the_bundle_that_it_would_get_alone(digits: Path, tmp_path: Path) -> None:
    names = ("raspberry-pi-5", "raspberry-pi-zero-2w", "jetson-orin-nano")
    limits = ("--bytes-per-round", "300000")
    targets = ("--target", ",".join(names[:2]), "--target", names[2])
    assert main([str(digits), *targets, "--out", str(tmp_path / "all"), *limits]) == 0
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == sorted(names)
    for name in names:
        assert main([str(digits), "--target", name, "--out", str(tmp_path / name), *limits]) == 0
        assert open_bundle(tmp_path / "all" / name).target == name
        assert manifest_without_reports(tmp_path / "all" / name) == manifest_without_reports(tmp_path / name)
        for file in FILES:
            assert (tmp_path / "all" / name / file).read_bytes() == (tmp_path / name / file).read_bytes()


def test_a_target_that_does_not_fit_is_one_line_and_the_others_are_written(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    # A board whose link carries next to nothing in a round.
    lines = (profile_store.shipped_profiles_folder() / "raspberry-pi-5.toml").read_text().splitlines()
    lines = ["bytes_per_round = 1000" if n.startswith("bytes_per_round") else n for n in lines]
    tight = tmp_path / "tight.toml"
    tight.write_text("\n".join(lines).replace('name = "raspberry-pi-5"', 'name = "tight"') + "\n")
    assert main([str(digits), "--target", f"{tight},raspberry-pi-5", "--out", str(out)]) == ExitCode.PLAN
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert output.err.startswith("error: tight: no width of digits fits tight")
    assert "bundles: 1 of 2" in output.out
    assert [p.name for p in out.iterdir()] == ["raspberry-pi-5"]
    open_bundle(out / "raspberry-pi-5")


@pytest.mark.torch
def test_a_torch_module_is_exported_once_for_all_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = """
        import gc
        from torch import nn
        calls = []
        def net():
            calls.append(gc.isenabled())
            return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    """
    (tmp_path / "net_of_targets.py").write_text(dedent(body))
    monkeypatch.syspath_prepend(tmp_path)
    words = ["net_of_targets:net", "--input-shape", "1,4,4", "--target", "raspberry-pi-5,raspberry-pi-4b"]
    assert main([*words, "--out", str(tmp_path / "out")]) == ExitCode.OK
    assert capsys.readouterr().out.endswith("; torch exported net_of_targets:net once for all\n")
    # The collector, which would look through all of torch, is paused while the module is made, and no longer.
    assert (importlib.import_module("net_of_targets").calls, gc.isenabled()) == ([False], True)


def test_own_profiles_are_taken_by_name(digits: Path, tmp_path: Path) -> None:
    shipped = (profile_store.shipped_profiles_folder() / "raspberry-pi-5.toml").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "field.toml").write_text(shipped.replace('name = "raspberry-pi-5"', 'name = "field"'))
    words = [str(digits), "--target", "field", "--out", str(tmp_path / "out")]
    assert main(words) == ExitCode.PROFILE
    assert main([*words, "--profiles", str(tmp_path / "mine")]) == ExitCode.OK
    assert open_bundle(tmp_path / "out").target == "field"


@pytest.mark.parametrize(
    ("targets", "code", "message"),
    [
        ("raspberry-pi-5,raspberry-pi-5", ExitCode.USAGE, "two targets have the same name"),
        (",", ExitCode.USAGE, "--target: expected the name"),
        ("raspberry-pi-5,toaster", ExitCode.PROFILE, "toaster"),
    ],
)
def test_targets_that_make_no_sense(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], targets: str, code: ExitCode, message: str
) -> None:
    assert main([str(digits), "--target", targets, "--out", str(tmp_path / "o")]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_several_targets_do_not_go_into_a_bundle(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert main([str(digits), "--target", "raspberry-pi-5", "--out", str(out)]) == ExitCode.OK
    before = sorted(p.name for p in out.iterdir())
    assert main([str(digits), "--target", "raspberry-pi-5,raspberry-pi-4b", "--out", str(out)]) == ExitCode.BUNDLE
    assert sorted(p.name for p in out.iterdir()) == before
