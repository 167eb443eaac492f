"""A fleet to begin with: what `fedprune-simulate new` writes runs as it stands."""

import sys
from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import ExitCode
from fedprune.planning import profile_store
from fedprune_server.cli.simulate import main
from fedprune_server.simulation.digits import load_digits
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.starter import STARTER_BOARDS, write_starter
from support.paths import ROOT


def test_its_boards_have_links_and_samples_of_their_own(tmp_path: Path) -> None:
    dealt = write_starter(tmp_path, STARTER_BOARDS, seed=3)
    sizes = []
    for board in STARTER_BOARDS:
        profile = profile_store.read_profile(tmp_path / "profiles" / f"{board.name}.toml")
        shipped = profile_store.find_profile(board.profile)
        assert (profile.name, profile.link.bytes_per_round) == (board.name, board.round_bytes)
        assert (profile.cpu, profile.memory, profile.compute) == (shipped.cpu, shipped.memory, shipped.compute)
        with np.load(tmp_path / f"{board.name}.npz") as file:
            np.testing.assert_array_equal(file["x_train"], dealt[board.name].x_train)
            sizes.append(len(file["y_train"]) + len(file["y_test"]))
    assert (tmp_path / "my_strategy.py").read_text() in (ROOT / "docs" / "write-a-strategy.md").read_text()
    for name in ("server", "calibration"):
        with np.load(tmp_path / f"{name}.npz") as file:
            sizes.append(len(file["x"]))
    assert sum(sizes) == len(load_digits()[1])


@pytest.mark.soak
def test_it_is_simulated_with_its_own_strategy_at_widths_that_its_links_carry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_strategy", raising=False)
    assert main(["new", "My fleet!"]) == ExitCode.OK
    assert capsys.readouterr().out.endswith("Next: fedprune-simulate --config My fleet!/fleet.toml --out run\n")
    monkeypatch.chdir(tmp_path / "My fleet!")
    for strategy in ("fedprune", "my_strategy:energy"):
        out = tmp_path / strategy.partition(":")[0]
        assert main(["--config", "fleet.toml", "--rounds", "2", "--strategy", strategy, "--out", str(out)]) == 0
        record = Record.load(out / "metrics.json")
        assert record.title == "my-fleet"
        planned = {row.name: row.density for row in record.devices}
        densities = [planned[board.name] for board in STARTER_BOARDS]
        assert densities == sorted(set(densities)), "each board's is wider than the one before"
        assert densities[-1] == 1


@pytest.mark.parametrize(
    ("boards", "what"),
    [
        ("attic=raspberry-pi-5:much", "expected bytes"),
        ("server=raspberry-pi-5", "other than server and calibration"),
        ("../attic=raspberry-pi-5", "a name of 1 to 64"),
        ("a=raspberry-pi-5,a=raspberry-pi-5", "different names"),
    ],
)
def test_boards_that_are_none_are_refused_before_anything_is_written(
    boards: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["new", str(tmp_path / "fleet"), "--boards", boards])
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code != ExitCode.OK
    assert what in capsys.readouterr().err
    assert not (tmp_path / "fleet").exists()
