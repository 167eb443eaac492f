"""`fedprune-export`: a model and a board in, a bundle out."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedprune import __version__, profile_store
from fedprune.cli import run_command, seconds, whole_number, with_extra
from fedprune.errors import ConfigError, ExitCode, ModelError, UsageError
from fedprune.plan import DENSITIES, plan
from fedprune.recipe import Recipe
from fedprune.scoring import ranks, score
from fedprune.selection import Selection

_SCORERS = ("ordered", "magnitude")
"""Those that look at a model alone; curvature needs what a fleet has learnt."""

_PARITY_LIMIT = 1e-4
"""Float32 sums in another order differ by less than 1e-5; more means that the cut is wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _profiles_parser if words[:1] == ["profiles"] else build_parser
    return run_command("fedprune-export", parser, words)


def build_parser() -> argparse.ArgumentParser:
    """The grammar of an export."""
    parser = argparse.ArgumentParser(
        prog="fedprune-export",
        description="Cut a model to what a board can train, and write the board's bundle.",
        epilog="fedprune-export profiles list|show|check looks at hardware profiles. "
        "Exit codes are explained in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="version", version=f"fedprune {__version__}")
    parser.add_argument("model", metavar="MODEL", help="model.onnx, or package.module:factory of a torch module")
    parser.add_argument("--target", required=True, metavar="PROFILE", help="hardware profile: a name or a TOML file")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the bundle's folder")
    parser.add_argument("--density", type=_density, default=None, help="kept share of all channels, or auto (default)")
    parser.add_argument("--scorer", default="magnitude", choices=_SCORERS, help="how channels are ranked")
    parser.add_argument(
        "--samples",
        type=whole_number,
        default=1000,
        metavar="N",
        help="training samples that the board holds (default: 1000)",
    )
    parser.add_argument("--input-shape", type=_shape, metavar="C,H,W", help="one sample's shape, for torch modules")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="local training as JSON (default: fedprune's)")
    parser.add_argument(
        "--bytes-per-round", type=whole_number, metavar="N", help="what a round may carry, down plus up"
    )
    parser.add_argument("--deadline", type=seconds, metavar="SECONDS", help="what a round may take")
    parser.add_argument("--class-names", type=_names, default=(), metavar="A,B,C", help="names of the classes")
    parser.add_argument("--name", help="the model's name (default: that of the file or factory)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=with_extra("export", _export))
    return parser


def _profiles_parser() -> argparse.ArgumentParser:
    from fedprune_export.profiles_cli import register

    parser = argparse.ArgumentParser(prog="fedprune-export")
    register(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    parser.set_defaults(run=_profiles)
    return parser


def _profiles(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.function
    return action(arguments)


def _export(arguments: argparse.Namespace) -> int:
    # Heavy imports wait until the command line is known to make sense.
    from fedprune_export.bundle import bundle_files, check_folder, write_bundle
    from fedprune_export.importing import load
    from fedprune_export.report import Report, parity

    if arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out} is a file", expected="a folder, which is made if missing")
    check_folder(arguments.out)
    profile = profile_store.chosen(arguments.target)
    recipe = _recipe(arguments.recipe)
    with _progress() as tell:
        tell(f"importing {arguments.model}")
        model = load(arguments.model, name=arguments.name, input_shape=arguments.input_shape)
        classes = model.architecture.classes
        if arguments.class_names and len(arguments.class_names) != classes:
            raise UsageError("--class-names", expected=f"{classes} names", got=len(arguments.class_names))
        tell("planning")
        chosen = plan(
            model.architecture,
            profile,
            recipe,
            arguments.samples,
            byte_budget=arguments.bytes_per_round,
            deadline_s=arguments.deadline,
            densities=DENSITIES if arguments.density is None else (arguments.density,),
        )
        order = ranks(score(arguments.scorer, model.architecture, model.tensors))
        selection = Selection.of(model.architecture, chosen.widths, order)
        tell("deriving the training step")
        files = bundle_files(model, selection, recipe)
        tell("checking the cut")
        error = parity(model, selection, files)
        if not error <= _PARITY_LIMIT:
            raise ModelError(
                "the cut model computes something else than the masked one",
                expected=f"outputs equal to {_PARITY_LIMIT:g}",
                got=f"{error:.2g}",
                hint="Please report this with the model.",
            )
        sizes = {n: len(raw) for n, raw in files.items()}
        report = Report(model, selection, profile.name, chosen, arguments.scorer, sizes, error)
        files["report.json"] = (json.dumps(report.to_dict(), indent=2) + "\n").encode()
        files["report.md"] = report.to_markdown().encode()
        write_bundle(arguments.out, files, selection, recipe, profile.name, tuple(arguments.class_names))
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
        return int(ExitCode.OK)
    print(chosen.describe())
    before, after = report.before, report.after
    print(f"parameters: {before.parameters:,} -> {after.parameters:,}")
    print(f"multiplications per sample: {before.forward_macs:,} -> {after.forward_macs:,}")
    print(f"weights: {before.wire_bytes:,} -> {after.wire_bytes:,} bytes")
    print(f"parity with the masked model: {error:.1e}")
    for note in model.notes:
        print(f"note: {note}")
    print(f"bundle: {arguments.out} (report.md says more)")
    return int(ExitCode.OK)


def _recipe(path: Path | None) -> Recipe:
    if path is None:
        return Recipe()
    try:
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    if not isinstance(body, dict):
        raise ConfigError(f"{path}", expected="an object of recipe settings", got=type(body).__name__)
    try:
        return Recipe.from_dict(body)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Says what is being done, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(text)


def _density(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, or auto, got {text!r}")
    return value


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(whole_number(n) for n in text.replace("x", ",").split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected sizes of 1 or more, such as 3,32,32, got {text!r}") from error


def _names(text: str) -> tuple[Any, ...]:
    return tuple(n.strip() for n in text.split(","))
