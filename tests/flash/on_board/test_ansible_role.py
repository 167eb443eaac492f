"""The Ansible role of deploy/ansible, against real sshd processes on this machine, each of which is a board."""

import hashlib
import os
import platform
import re
import shlex
import shutil
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

ANSIBLE, PRODUCTION = ROOT / "deploy/ansible", ROOT / "docs/production.md"
BIN = Path(sys.executable).parent
GOOD = ("attic", "cellar")


@pytest.fixture
def boards(tmp_path: Path) -> Iterator[Boards]:
    test_boards = Boards(tmp_path, [*GOOD, "shed", "gone"])
    yield test_boards
    test_boards.stop()


INTERPRETER = """
import sys
if "install.pyz" in " ".join(sys.orig_argv):
    raise SystemExit("root runs what a user's environment names")
"""


def run_ansible(folder: Path, *words: str) -> str:
    """What a command of Ansible prints."""
    settings = {
        "ANSIBLE_HOME": str(folder / "ansible"),
        "ANSIBLE_PIPELINING": "1",
        # A shared connection outlives the command, and keeps its error output open as long.
        "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=2s",
        "LC_ALL": "C.UTF-8",  # without which it doesn't start
    }
    command = [str(BIN / words[0]), *words[1:]]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **settings}, cwd=folder
    )
    print(done.stdout + done.stderr)
    return done.stdout + done.stderr


def play(folder: Path, inventory: Path, *options: str) -> tuple[str, dict[str, dict[str, int]]]:
    """What `ansible-playbook` prints, and its counts of each board."""
    output = run_ansible(folder, "ansible-playbook", "-i", str(inventory), str(ANSIBLE / "install.yml"), *options)
    recap = output.partition("PLAY RECAP")[2]
    counts = {
        line.split()[0]: {key: int(number) for key, number in re.findall(r"(\w+)=(\d+)", line)}
        for line in recap.splitlines()[1:]
        if line
    }
    return output, counts


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
    kit = build_kit(tmp_path / "kit", board, here, wheel=fedprune_wheel, links=[wheels], signer=signer)
    inventory = boards.inventory(
        fedprune_kit=str(kit.folder),
        fedprune_kit_sha256=kit.digest,
        fedprune_model="Raspberry Pi 5",
        fedprune_claim_command=[*server, "claim", *state],
        fedprune_wait=20,
    )
    by_name = {b.name: b for b in boards.boards}
    for test_board in boards.boards:
        (test_board.root / "proc/device-tree").mkdir(parents=True)
        (test_board.root / "proc/device-tree/model").write_text("Raspberry Pi 5 Model B Rev 1.0\0")
    (tmp_path / "python").mkdir()
    (tmp_path / "python/sitecustomize.py").write_text(INTERPRETER)
    broken = by_name["shed"].root / "run/broken"
    broken.parent.mkdir()
    broken.touch()
    by_name["gone"].process.terminate()
    by_name["gone"].process.wait()

    known_hosts = tmp_path / "known_hosts"
    host_keys = known_hosts.read_text()
    known_hosts.unlink()
    assert "Host key verification failed" in play(tmp_path, inventory, "--limit", "attic")[0]
    (line,) = re.findall(r"^    (ansible boards .* -m ping .*)$", PRODUCTION.read_text(), re.MULTILINE)
    run_ansible(tmp_path, *shlex.split(line.replace("/srv/fleet/boards.yml", str(inventory))))
    assert [line.split()[1:] for line in known_hosts.read_text().splitlines()] == [host_keys.split()[1:3]] * 3

    changed = shutil.copytree(kit.folder, tmp_path / "changed")
    (changed / "install.pyz").write_bytes((changed / "install.pyz").read_bytes() + b"\n")
    foreign = shutil.copytree(kit.folder, tmp_path / "foreign")
    manifest = (foreign / "kit.json").read_text().replace(f'"{here.python}"', '"3.99"')
    (foreign / "kit.json").write_text(manifest)
    refusals = {
        "has another digest": {"fedprune_kit": foreign},
        "this kit is for Python 3.99": {
            "fedprune_kit": foreign,
            "fedprune_kit_sha256": hashlib.sha256(manifest.encode()).hexdigest(),
        },
        "expected Jetson, got Raspberry Pi 5 Model B Rev 1.0": {"fedprune_model": "Jetson"},
        "is damaged": {"fedprune_kit": changed},
    }
    for reason, variables in refusals.items():
        options = [word for name, value in variables.items() for word in ("-e", f"{name}={value}")]
        output, counts = play(tmp_path, inventory, "--limit", "attic", *options)
        assert (counts["attic"]["failed"], reason in output) == (1, True)
        copied_kit = by_name["attic"].root / "var/cache/fedprune-kit"
        assert (copied_kit.exists(), by_name["attic"].claim.exists()) == (reason == "is damaged", False)

    output, counts = play(tmp_path, inventory, "-v")

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

    assert [counts[name]["changed"] for name in GOOD] == [0, 0]
    assert counts["shed"]["failed"] == 0
    assert {name: by_name[name].claim.read_text() for name in claims} == claims
