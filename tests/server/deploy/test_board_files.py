"""Files that run boards as containers: Compose and balena, compared with the program and the schema of Compose."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedprune import __version__
from fedprune.planning.profile_store import profile_names as names_of_profiles
from fedprune_device.cli.main import build_parser
from support.processes.compose_file import DEPLOY, read_compose

BOARD, BALENA = DEPLOY / "board", DEPLOY / "balena"
ENVIRONMENT = {
    "FEDPRUNE_BROKER": "mqtts://fleet.example",
    "FEDPRUNE_DEVICE": "attic",
    "FEDPRUNE_PROFILE": "raspberry-pi-5",
}
CLAIM = "a-claim-for-one-board"


def bodies() -> dict[str, dict[str, Any]]:
    """All Compose files, by their paths."""
    server = read_compose({"FEDPRUNE_HOST": "fleet.example"})
    balena = yaml.safe_load((BALENA / "docker-compose.yml").read_text())
    shared = {k: v for k, v in server.items() if not k.startswith("x-")}
    return {"compose.yaml": shared, "board/compose.yaml": read_compose(ENVIRONMENT, BOARD), "balena": balena}


@pytest.mark.parametrize("name", ["compose.yaml", "board/compose.yaml", "balena"])
def test_the_schema_of_compose_knows_every_word(name: str) -> None:
    compose_spec = pytest.importorskip("compose_spec")
    body = bodies()[name]
    compose_spec.PyCompose.from_json(json.dumps(body))
    for key in ("restrat", "read_onyl"):
        service = next(iter(body["services"]))
        wrong = {**body, "services": {**body["services"], service: {**body["services"][service], key: "always"}}}
        with pytest.raises(ValueError, match=key):
            compose_spec.PyCompose.from_json(json.dumps(wrong))


def test_the_board_s_container_runs_the_program_s_command() -> None:
    (service,) = read_compose(ENVIRONMENT, BOARD)["services"].values()
    assert service["image"] == f"fedprune-board:{__version__}"
    arguments = build_parser().parse_args(service["command"])
    assert arguments.profile in names_of_profiles()
    targets = {text.split(":")[1]: text for text in service["volumes"]}
    assert str(arguments.state) in targets
    assert str(Path(arguments.data).parent) in targets
    assert targets["/srv/fedprune"].endswith(":ro")
    assert Path(arguments.claim).parent == Path(arguments.data).parent  # in a folder, a claim that is spent may go
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])


def run_start_script(tmp_path: Path, **environment: str) -> tuple[int, list[str], str]:
    """What balena's start runs: the exit code, the program's arguments, and what it reads on standard input."""
    python = tmp_path / "python3"
    python.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$FEDPRUNE_DEVICE" "${FEDPRUNE_CLAIM-unset}" "$@" >"$OUT"\ncat >"$OUT.in"\n'
    )
    python.chmod(0o755)
    out = tmp_path / "out"
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(out), **environment}
    command = ["sh", str(BALENA / "start.sh")]
    done = subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    lines = out.read_text().splitlines() if out.exists() else [done.stderr.decode()]
    return done.returncode, lines, out.with_suffix(".in").read_text() if out.exists() else ""


def test_balena_s_variables_become_the_program_s_command(tmp_path: Path) -> None:
    expected = {
        "FEDPRUNE_BROKER": "mqtts://fleet.example",
        "FEDPRUNE_PROFILE": "raspberry-pi-4b",
        "BALENA_DEVICE_UUID": "ab" * 16,
    }
    code, (device, claim, *words), read = run_start_script(tmp_path, **expected)
    assert (code, device, claim, read) == (0, "ab" * 16, "unset", "")
    assert words[:2] == ["-m", "fedprune_device.cli.main"]
    arguments = build_parser().parse_args(words[2:])
    assert (arguments.profile, arguments.claim) == ("raspberry-pi-4b", None)
    volumes = [text.split(":")[1] for text in bodies()["balena"]["services"]["board"]["volumes"]]
    assert {str(arguments.state), str(Path(arguments.data).parent)} == set(volumes)
    code, (device, claim, *words), read = run_start_script(
        tmp_path, **expected, FEDPRUNE_DEVICE="attic", FEDPRUNE_CLAIM=CLAIM
    )
    assert (code, device, claim, read) == (0, "attic", "unset", f"{CLAIM}\n"), "no claim is in a process list"
    assert build_parser().parse_args(words[2:]).claim == "-"
