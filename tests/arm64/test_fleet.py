"""A board from its kit to its first update: another processor, Debian's own Python, no network while it installs."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedprune.model.architecture import widths_at
from fedprune.security.keys import SigningKey
from fedprune_export.importing import import_onnx
from fedprune_flash import BoardSettings, BoardTarget, build_kit
from fedprune_server.simulation.digits import digits_model
from support.processes.arm_board import copy_userland
from support.processes.arm_installation import install, program, service
from support.processes.arm_site import SITE, Headquarters
from support.processes.arm_userland import BOOKWORM, JAMMY, TRIXIE, System, userland

pytestmark = [pytest.mark.mosquitto, pytest.mark.system, pytest.mark.timeout(1200)]

DEVICE = "attic"
SAMPLES = "/srv/fedprune/samples.npz"


@pytest.mark.parametrize("system", [BOOKWORM, TRIXIE, JAMMY], ids=lambda s: f"{s.name}-python{s.python}")
def test_a_board_installs_offline_joins_trains_and_counts(system: System, own_wheel: Path, tmp_path: Path) -> None:
    board = copy_userland(userland(system), tmp_path / "board")
    site = Headquarters(tmp_path / "site", DEVICE)
    kit = build_kit(
        tmp_path / "kit",
        BoardSettings(site.url, DEVICE, SITE, SAMPLES),
        BoardTarget(system.python),
        wheel=own_wheel,
        claim=site.claim(),
        signer=SigningKey.load(site.state / "identity/signing.key"),
    )
    assert "make the system user fedprune" in install(board, kit.folder)
    (board.root / "srv/fedprune").mkdir(parents=True)
    shutil.copyfile(site.samples, board.root / SAMPLES[1:])
    with (board.root / "etc/fedprune/device.env").open("a") as file:
        file.write(f"FEDPRUNE_JOIN={site.join_url}\n")

    started, command = service(board)
    command += ["--no-probe", "--profile", "raspberry-pi-4b", "--threads", "1", "--until-finished"]
    with site, started.running(command, site.folder / "board.log") as agent:
        site.wait(lambda: site.ended or agent.poll() not in (None, 0), "the round ends", 600)
        assert site.ended, site.logs()
        status = site.status()
        assert site.members() == {DEVICE: "approved"}
        assert agent.wait(120) == 0, site.logs()
    assert (status["phase"], status["round"]) == ("finished", 1)
    (row,) = status["rounds"]
    assert row["devices"][DEVICE]["progress"] == "folded"
    (device,) = status["devices"]
    assert (device["name"], device["profile"]) == (DEVICE, "raspberry-pi-4b")
    architecture = import_onnx(digits_model(), "digits").architecture
    assert tuple(device["widths"]) == widths_at(architecture, site.density) != widths_at(architecture, 1)
    assert not (board.root / "var/lib/fedprune/claim").exists()

    # What serves there gives there what it gives here.
    with np.load(site.samples) as samples:
        np.save(board.root / "x.npy", samples["x_test"][:50])
    asked, words = program(board)
    predict = ["predict", "--state", "/var/lib/fedprune", "--input", "/x.npy", "--output", "/logits.npy"]
    done = asked.run(*words, *predict)
    assert done.returncode == 0, done.stderr
    state, out = board.root / "var/lib/fedprune", tmp_path / "logits.npy"
    here = ["--state", str(state), "--input", str(board.root / "x.npy"), "--output", str(out)]
    subprocess.run([sys.executable, "-m", "fedprune_device.cli.main", "predict", *here], check=True)
    np.testing.assert_allclose(np.load(board.root / "logits.npy"), np.load(out), rtol=1e-3, atol=1e-4)
