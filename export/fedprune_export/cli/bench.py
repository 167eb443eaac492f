"""`bench BUNDLE`: time a bundle's training steps and predictions on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprune.core.cli import whole_number
from fedprune.core.errors import ExitCode, UsageError
from fedprune.core.text import amount, quantity
from fedprune.hardware import profile_store
from fedprune.hardware.probe_report import ProbeReport
from fedprune.hardware.profile import HardwareProfile
from fedprune.planning.cost_prediction import predict
from fedprune.runtime.blocks import block_size, turned_off
from fedprune.runtime.bundle import Bundle, open_bundle
from fedprune.runtime.precision import FLOAT32
from fedprune.terminal import tables
from fedprune.terminal.tables import Column
from fedprune.training.recipe import Recipe
from fedprune_export.cli.options import add_probe_option, add_profiles_option, read_probe

if TYPE_CHECKING:  # heavy imports wait until the command line is known to make sense
    from fedprune_export.profiling.benchmark import Measurement


def register(subparsers: Any) -> None:
    """Add the command `bench`; its function takes the parsed arguments and returns an exit code.

    Args:
        subparsers: What `ArgumentParser.add_subparsers` returned.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="time a bundle on this machine",
        description="Time training steps and predictions of a bundle on this machine, with random samples, each in a "
        "process of its own. With --target, what the planner predicts for a board stands beside it.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--runs", type=whole_number, default=30, metavar="N", help="timed runs of each (default: 30)")
    parser.add_argument(
        "--batch",
        type=_numbers,
        metavar="N,N",
        help="samples of a run (default: the recipe's for training, 1 and the recipe's for predictions)",
    )
    parser.add_argument("--threads", type=_numbers, default=(1,), metavar="N,N", help="threads (default: 1)")
    parser.add_argument("--target", metavar="PROFILE", help="hardware profile to predict for: a name or a TOML file")
    add_profiles_option(parser)
    add_probe_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(function=bench)


def bench(arguments: argparse.Namespace) -> int:
    """Print what was measured.

    Raises:
        FedpruneError: The bundle is damaged, a graph can't be run, or there is no such profile; or the environment
            doesn't say whether there are blocks here.
    """
    turned_off()  # says what is wrong with the setting before the work begins
    profile = profile_store.chosen(arguments.target, arguments.profiles) if arguments.target else None
    probe = read_probe(arguments)
    if probe is not None and profile is None:
        raise UsageError("--probe says what a board measured", expected="its --target, too")
    bundle = open_bundle(arguments.bundle)
    measured = _measure(bundle, arguments)
    rows = [(m, _predicted(m, bundle, profile, probe) if profile is not None else (None, None)) for m in measured]
    if arguments.json:
        body: dict[str, Any] = {
            "bundle": str(arguments.bundle),
            "model": bundle.architecture.name,
            "widths": list(bundle.selection.widths),
            "target": profile.name if profile is not None else None,
            "measured": [
                m.to_dict() if profile is None else {**m.to_dict(), "predicted": {"seconds": s, "peak_bytes": b}}
                for m, (s, b) in rows
            ],
        }
        tables.print_json(body)
        return int(ExitCode.OK)
    tables.print_table(_columns(profile), [_row(m, p, predicted_too=profile is not None) for m, p in rows])
    return int(ExitCode.OK)


def _columns(profile: HardwareProfile | None) -> list[Column]:
    columns = [
        Column("what"),
        Column("batch", right=True),
        Column("threads", right=True, drop=1),
        Column("median", right=True),
        Column("quartiles", drop=3),
        Column("per sample", right=True, drop=2),
        Column("peak memory", right=True),
    ]
    if profile is not None:
        columns += [Column(f"predicted for {profile.name}", right=True, wrap=16), Column("its memory", right=True)]
    return columns


def _measure(bundle: Bundle, arguments: argparse.Namespace) -> list[Measurement]:
    from fedprune_export.profiling.benchmark import Stopwatch

    watch = Stopwatch(bundle, arguments.runs)
    usual = bundle.recipe.micro_batch
    with tables.progress() as tell:
        out = []
        for threads in arguments.threads:
            for batch in arguments.batch or (usual,):
                # Steps in blocks take whole batches alone.
                for block in (0, *(b for b in bundle.blocks if b == block_size() and batch == usual)):
                    tell(f"training, {quantity(batch, 'sample')}, {quantity(threads, 'thread')}")
                    out.append(watch.training_step(batch, threads, block))
            for batch in arguments.batch or tuple(sorted({1, usual})):
                for precision in (FLOAT32, *bundle.precisions):
                    tell(f"predicting with {precision}, {quantity(batch, 'sample')}, {quantity(threads, 'thread')}")
                    out.append(watch.prediction(batch, threads, precision))
        return out


def _predicted(
    measured: Measurement, bundle: Bundle, profile: HardwareProfile, probe: ProbeReport | None
) -> tuple[float | None, float | None]:
    """Seconds and bytes that the planner expects of what was measured, as far as it says."""
    from fedprune_export.profiling.benchmark import PREDICTION, STEP

    if measured.what not in (STEP, PREDICTION):
        return None, None  # the planner knows float32
    batch = measured.batch
    recipe = Recipe.from_dict({**bundle.recipe.to_dict(), "batch_size": batch, "accumulate": 1})
    said = predict(bundle.architecture, bundle.selection.widths, profile, recipe, batch, probe=probe)
    if measured.what == STEP:
        return said.step_s, said.memory_bytes
    # The planner looks at predictions of one sample.
    return (said.latency_s, said.inference_bytes) if batch == 1 else (None, None)


def _row(
    m: Measurement, predicted: tuple[float | None, float | None], *, predicted_too: bool = False
) -> tuple[str, ...]:
    low, median, high = (amount(s, "s") for s in m.quartiles)
    out = [
        m.what,
        str(m.batch),
        str(m.threads),
        median,
        f"{low} to {high}",
        amount(m.seconds / m.batch, "s"),
        amount(m.peak_bytes, "bytes"),
    ]
    if predicted_too:
        seconds, peak = predicted
        out.append(amount(seconds, "s") if seconds is not None else "–")
        out.append(amount(peak, "bytes") if peak is not None else "–")
    return tuple(out)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(whole_number(n) for n in text.split(","))
