"""Commands for a state folder, `status`, `export-model`, `replay` and `health`, and their option `--state`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from fedprune.core.cli import seconds, whole_number, with_extra
from fedprune.core.errors import ExitCode, UsageError
from fedprune.core.text import amount, quantity

VARIABLE = "FEDPRUNE_SERVER_STATE"
_DEFAULT = "fedprune-state"
_TEXT = "the folder of `run --state`"
_PULSE = "FEDPRUNE_PULSE"


def add_state(parser: argparse.ArgumentParser, text: str = _TEXT) -> None:
    said = f"{text} (default: {VARIABLE}, or {_DEFAULT})"
    parser.add_argument("--state", type=Path, default=_folder(), metavar="DIR", help=said)


def _folder() -> Path:
    found = {name: os.environ[name] for name in (VARIABLE, f"{VARIABLE}_FILE") if os.environ.get(name, "").strip()}
    if list(found) in ([], [VARIABLE]):
        return Path(found.get(VARIABLE, _DEFAULT))
    from fedprune_server.config.environment import environment_layer  # as rarely as it is needed: it takes a while

    return Path(environment_layer(found).tables["server"]["state"])


def add_state_commands(commands: Any) -> None:
    status = commands.add_parser("status", help="show devices and rounds of a state folder")
    add_state(status)
    status.add_argument(
        "--rounds", type=whole_number, metavar="N", help="the last N rounds (default: 10; all with --json)"
    )
    status.add_argument("--json", action="store_true", help="as JSON, for programs")
    status.set_defaults(run=with_extra("server", _status))
    export = commands.add_parser("export-model", help="write the global model of a state folder")
    add_state(export)
    export.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="model.onnx, weights.safetensors, or state.pt; written over if it is there",
    )
    export.add_argument("--opset", type=whole_number, metavar="N", help="opset of the .onnx file (default: 17)")
    export.add_argument("--round", type=int, metavar="N", help="after this round, if its model is still kept")
    export.set_defaults(run=with_extra("server", _export_model))
    replay = commands.add_parser("replay", help="work a job out again from its log, and compare")
    add_state(replay)
    replay.set_defaults(run=with_extra("server", _replay))


def add_health_command(commands: Any) -> None:
    health = commands.add_parser("health", help=f"whether the server lives that has {_PULSE} in its environment")
    health.add_argument("--pulse", type=Path, metavar="FILE", help=f"the file that it touches (default: {_PULSE})")
    health.add_argument("--within", type=seconds, default=120.0, metavar="S", help="how long ago (default: 120)")
    health.add_argument("--ready", action="store_true", help="it must run, too, not only stand by")
    health.set_defaults(run=_health)


def _status(arguments: argparse.Namespace) -> int:
    from fedprune_server.cli.status import LATEST, describe, status_of_all

    body = status_of_all(arguments.state)
    if arguments.json:
        for job in (body, *body.get("jobs", [])):
            job["rounds"] = job["rounds"][-(arguments.rounds or len(job["rounds"])) :]
        print(json.dumps(body, indent=2, sort_keys=True))
    else:
        print(describe(body, arguments.rounds or LATEST))
    return int(ExitCode.OK)


def _replay(arguments: argparse.Namespace) -> int:
    from fedprune_server.maintenance.replay import replay

    rounds = 0
    for step in replay(arguments.state):
        rounds += 1
        print(f"round {step.round}: {step.model} ({quantity(len(step.devices), 'device')}: {', '.join(step.devices)})")
    print(f"{quantity(rounds, 'round')}, every model the same to the bit" if rounds else "no round has ended yet")
    return int(ExitCode.OK)


def _export_model(arguments: argparse.Namespace) -> int:
    from fedprune.core import tensorfile
    from fedprune.core.atomic_file import write_whole
    from fedprune_export.bundles import conversion
    from fedprune_server.engine.state_directory import global_model, model_after

    out: Path = arguments.out
    if out.suffix not in (".onnx", ".safetensors", ".pt", ".pth"):
        raise UsageError("--out", expected="a file name that ends in .onnx, .safetensors, .pt or .pth", got=str(out))
    digest = None if arguments.round is None else model_after(arguments.state, arguments.round)
    model, weights = global_model(arguments.state, digest)
    model = conversion.with_weights(model, tensorfile.decode(weights), str(arguments.state))
    if out.suffix == ".safetensors":
        write_whole(out, weights)
        size, compared = len(weights), ""
    elif out.suffix == ".onnx":
        raw = conversion.onnx_file(model.graph, model.tensors, model.architecture.name, arguments.opset)
        compared = f"; {conversion.agreement(conversion.onnx_parity(raw, model.graph))}"
        write_whole(out, raw)
        size = len(raw)
    else:
        state = conversion.state_dict(model.tensors, model.graph)
        compared = f"; {conversion.agreement(conversion.state_parity(state, model.graph, model.graph))}"
        size = conversion.write_state_dict(out, state)
    print(f"{out}: {amount(size, 'bytes')}{compared}")
    return int(ExitCode.OK)


def _health(arguments: argparse.Namespace) -> int:
    from fedprune_server.monitoring.health import check_pulse

    path = arguments.pulse or (Path(os.environ[_PULSE]) if os.environ.get(_PULSE) else None)
    if path is None:
        raise UsageError("health", expected=f"--pulse FILE, or {_PULSE} in the environment", got="neither")
    print(check_pulse(path, arguments.within, running=arguments.ready))
    return int(ExitCode.OK)
