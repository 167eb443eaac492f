"""The Ansible role of deploy/ansible, against real sshd processes on this machine, each of which is a board."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprune.security.join_claim import JoinClaim
from fedprune.security.keys import SigningKey
from fedprune_flash import BoardSettings, BoardTarget, build_kit
from support.paths import ROOT
from support.processes.ssh_boards import Boards

ANSIBLE = ROOT / "deploy/ansible"
BIN = Path(sys.executable).parent
GOOD = ("attic", "cellar")


@pytest.fixture
def boards(tmp_path: Path) -> Iterator[Boards]:
    test_boards = Boards(tmp_path, [*GOOD, "shed", "gone"])
    yield test_boards
    test_boards.stop()


def play(folder: Path, inventory: Path, *options: str) -> tuple[str, dict[str, dict[str, int]]]:
    """What `ansible-playbook` prints, and its counts of each board."""
    settings = {
        "ANSIBLE_HOME": str(folder / "ansible"),
        "ANSIBLE_PIPELINING": "1",
        # A shared connection outlives the command, and keeps its error output open as long.
        "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=2s",
        "LC_ALL": "C.UTF-8",  # without which it doesn't start
    }
    command = [str(BIN / "ansible-playbook"), "-i", str(inventory), str(ANSIBLE / "install.yml"), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **settings}, cwd=folder
    )
    recap = done.stdout.partition("PLAY RECAP")[2]
    counts = {
        line.split()[0]: {key: int(number) for key, number in re.findall(r"(\w+)=(\d+)", line)}
        for line in recap.splitlines()[1:]
        if line
    }
    return done.stdout + done.stderr, counts


@pytest.mark.soak
@pytest.mark.system
def test_many_boards_are_installed_and_each_that_is_not_says_why(boards: Boards, tmp_path: Path, wheels: Path) -> None:
    server = [str(BIN / "fedprune-server")]
    state = ["--state", str(tmp_path / "state")]
    subprocess.run([*server, "init", *state, "--site", "lab"], check=True, capture_output=True)
    board = BoardSettings("mqtts://broker.example:8883", "any", "lab", "own.samples:load")
    here = BoardTarget(f"{sys.version_info[0]}.{sys.version_info[1]}", platform.machine())
    signer = SigningKey.load(tmp_path / "state/identity/signing.key")
    fedprune_wheel = next(wheels.glob("fedprune-*.whl"))
    kit = build_kit(tmp_path / "kit", board, here, wheel=fedprune_wheel, links=[wheels], signer=signer).folder
    inventory = boards.inventory(
        fedprune_kit=str(kit), fedprune_claim_command=[*server, "claim", *state], fedprune_wait=20
    )
    by_name = {b.name: b for b in boards.boards}
    broken = by_name["shed"].root / "run/broken"
    broken.parent.mkdir()
    broken.touch()
    by_name["gone"].process.terminate()
    by_name["gone"].process.wait()

    output, counts = play(tmp_path, inventory, "-v")

    print(output)
    claims = {name: by_name[name].claim.read_text() for name in (*GOOD, "shed")}
    assert len({JoinClaim.parse(text).id for text in claims.values()}) == 3
    assert not any(text in output for text in claims.values())
    assert counts["gone"]["unreachable"] == 1
    assert (counts["shed"]["failed"], "the service ends" in output) == (1, True)
    for name in GOOD:
        assert counts[name]["failed"] == 0
        assert f"FEDPRUNE_DEVICE={name}\n" in (by_name[name].root / "etc/fedprune/device.env").read_text()
        assert by_name[name].calls().count("restart --no-block fedprune.service") == 1

    broken.unlink()
    (by_name["shed"].root / "var/cache/fedprune-kit/wheelhouse/old-1-py3-none-any.whl").touch()
    output, counts = play(tmp_path, inventory)

    print(output)
    assert [counts[name]["changed"] for name in GOOD] == [0, 0]
    assert counts["shed"]["failed"] == 0
    assert {name: by_name[name].claim.read_text() for name in claims} == claims
