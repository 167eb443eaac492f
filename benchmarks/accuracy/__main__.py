"""Accuracy of strategies on real data, one command a table: `python -m benchmarks.accuracy TABLE`.

Every run (a method and a seed) is a process of its own. A run that was killed continues from where it was, and a
finished one is not repeated unless its settings have changed; its numbers lie under `build/accuracy`. The numbers of
all finished runs, and what they come to, are written to `benchmarks/results/accuracy` after every run, and fill the
tables of the pages; in another checkout the runs of that file count as finished. `summary` puts the verdicts of `EIGHT`
together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.accuracy import report
from benchmarks.accuracy.protocol import FULL, SAME_LOSS, Method, Protocol
from benchmarks.accuracy.strategy_code import strategy_digest
from fedprune.core.cli import run_command, with_extra
from fedprune.core.errors import ConfigError, TrainingError

RUNS = Path("build/accuracy")
RESULTS = Path("benchmarks/results/accuracy")


def main() -> int:
    """The command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs that were started end, too
    return run_command("python -m benchmarks.accuracy", parser)


def table(options: argparse.Namespace) -> int:
    """Run a table, or list them.

    Raises:
        ConfigError: There is no such table, row or seed.
        DataError: The data set isn't there.
        MissingExtraError: What makes the networks isn't installed.
    """
    from benchmarks.accuracy.papers import PAPERS
    from benchmarks.accuracy.protocols import EIGHT, PROTOCOLS, SAR

    small_papers = [*(p for p in PAPERS if not p.full), SAR]
    if options.table == "list":
        for protocol in PROTOCOLS.values():
            print(f"{protocol.name:28} {'for a GPU' if protocol.full else _budget([protocol])}: {protocol.title}")
        print(f"\n{f'the {len(EIGHT)} of the summary':28} {_budget(EIGHT)}")
        print(f"{'papers':28} {_budget(small_papers)}")
        return 0
    if options.table == "older":
        print("".join(f"{text}\n" for p in small_papers if (text := _older(p))), end="")
        return 0
    if options.table == "papers":
        return max(table(argparse.Namespace(**{**vars(options), "table": p.name})) for p in small_papers)
    if options.table == "summary":
        summarise(EIGHT)
        return 0
    if options.table not in PROTOCOLS:
        names = ", ".join(PROTOCOLS)
        raise ConfigError("table", expected=f"list, summary, papers, older or one of {names}", got=options.table)
    protocol = changed(PROTOCOLS[options.table], options)
    methods = [m for m in protocol.methods if not options.methods or m.name in options.methods.split(",")]
    if unknown := set(filter(None, options.methods.split(","))) - {m.name for m in methods}:
        names = ", ".join(m.name for m in protocol.methods)
        raise ConfigError(f"rows of {protocol.name}", expected=names, got=", ".join(sorted(unknown)))
    if options.one:
        from benchmarks.accuracy.run import run

        folder = options.runs / protocol.name
        run(protocol, methods[0], options.seeds[0], folder, workers=options.processes, cuda=options.cuda)
        return 0
    if protocol.changes:  # a look takes the place of no result
        options.runs = options.runs / "changed"
    else:
        restore(protocol, options)
    if failed := everything(protocol, methods, options):
        names = ", ".join(f"{name} seed {seed}" for name, seed in failed)
        raise TrainingError(f"{len(failed)} runs failed: {names}", hint="What they say is above.")
    save(protocol, options)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument(
        "table",
        help="a table's name; `papers` for all of the papers' that are scaled down; `list`; `summary`; or `older`, "
        "which names papers' pages whose strategies' code has changed",
    )
    parser.add_argument("--methods", default="", help="only these rows, separated by commas")
    parser.add_argument("--seeds", type=seeds, default=(), help="run only these, separated by commas")
    parser.add_argument("--rounds", type=int, default=0, help="instead of the table's")
    parser.add_argument("--most", type=int, default=0, help="samples that are used, instead of the table's")
    parser.add_argument("--steps", type=int, default=0, help="most local steps of a round, instead of the table's")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--processes", type=int, default=1, help="processes that train within a run")
    parser.add_argument("--cuda", action="store_true", help="train on an NVIDIA GPU")
    parser.add_argument("--again", action="store_true", help="run finished runs again")
    parser.add_argument("--older", action="store_true", help="run those again whose strategy's code has changed")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of runs")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=with_extra("torch", table))
    return parser


def seeds(text: str) -> tuple[int, ...]:
    """Whole numbers, separated by commas."""
    try:
        found = tuple(int(s) for s in text.split(","))
    except ValueError:
        found = (-1,)
    if min(found) < 0:
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, got {text!r}")
    return found


def changed(protocol: Protocol, options: argparse.Namespace) -> Protocol:
    """The protocol with what the command line says instead; further seeds join its own."""
    protocol = replace(protocol, seeds=tuple(sorted({*protocol.seeds, *options.seeds})))
    changes = [f"--{name} {getattr(options, name)}" for name in ("rounds", "most", "steps") if getattr(options, name)]
    if options.rounds:
        recipe = replace(protocol.recipe, evaluate_every=1)  # shares of so few rounds need not be measured ones
        protocol = replace(protocol, recipe=recipe).lasting(options.rounds)
    if options.most:
        protocol = replace(protocol, data={**protocol.data, "most": options.most})
    if options.steps:
        protocol = replace(protocol, recipe=replace(protocol.recipe, max_steps=options.steps))
    return replace(protocol, changes=" ".join(changes))


def _budget(protocols: Sequence[Protocol]) -> str:
    """Runs of tables and their CPU time, by recorded runs of any code, or else by those of similar rows."""
    runs = sum(len(p.methods) * len(p.seeds) for p in protocols)
    minutes = sum(len(p.seeds) * _minutes(p, m) for p in protocols for m in p.methods)
    return f"{runs} runs, {f'{minutes / 60:.1f} CPU hours' if minutes > 300 else f'{minutes:.0f} CPU minutes'}"


def _minutes(protocol: Protocol, method: Method) -> float:
    """CPU minutes of one run of a row, by the committed results."""
    runs = stored(protocol)["runs"]
    like = (method.name, "fedavg" if method.name in (FULL, SAME_LOSS) else "")
    found = next(filter(None, ([r["cpu_s"] / 60 for r in runs if r["method"] == name] for name in like)), None)
    return sum(found) / len(found) if found else protocol.minutes


def everything(protocol: Protocol, methods: list[Method], options: argparse.Namespace) -> list[tuple[str, int]]:
    """All runs that are missing, a few at a time, each in a process of its own. Returns row and seed of those that
    failed."""
    from benchmarks.accuracy.sets import samples

    for package in ("torch", "onnxscript"):
        import_module(package)  # what is missing is said once, not by every process
    samples(protocol.source)
    # Seed by seed: a first look comes early.
    wanted = [(m, s) for s in options.seeds or protocol.seeds for m in methods]
    for method, seed in wanted:
        path = result_of(protocol, method, seed, options)
        if options.again or (options.older and path.exists() and not _is_of_code(json.loads(path.read_text()), method)):
            forget(protocol, method, seed, options)
    left = [(m, s) for m, s in wanted if not finished(protocol, m, s, options)]
    minutes = sum(_minutes(protocol, method) for method, _ in left)
    print(f"{protocol.name}: {len(left)} of {len(wanted)} runs to do, about {minutes:.0f} CPU minutes", flush=True)
    running: dict[subprocess.Popen[bytes], tuple[str, int]] = {}
    failed = []
    try:
        while left or running:
            while left and len(running) < options.workers:
                method, seed = left.pop(0)
                running[start(protocol, method, seed, options)] = (method.name, seed)
            time.sleep(0.5)
            for process in [p for p in running if p.poll() is not None]:
                name = running.pop(process)
                if process.returncode:
                    failed.append(name)
                    print(f"{name[0]} seed {name[1]}: FAILED with exit code {process.returncode}", flush=True)
                else:
                    save(protocol, options)
    finally:
        for process in running:
            process.terminate()
    return failed


def _is_of_code(run: Mapping[str, Any], method: Method) -> bool:
    """Whether a run was made with the present code of its strategy."""
    return run.get("strategies") == strategy_digest(method.strategy)


def _older(protocol: Protocol) -> str:
    """A line on rows of a table that were made with other code than there is now; empty without any."""
    runs = {(r["method"], r["seed"]): r for r in stored(protocol)["runs"]}
    wanted = [(m, seed) for m in protocol.methods for seed in protocol.seeds]
    old = [f"{m.name} {s}" for m, s in wanted if not _is_of_code(runs.get((m.name, s), {}), m)]
    share = f"{len(old)} of {len(wanted)} runs are missing, or of earlier code of their strategies"
    return f"benchmarks/results/accuracy/{protocol.name}.md: {share}" if old else ""


def start(protocol: Protocol, method: Method, seed: int, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.accuracy", protocol.name, "--one", "--methods", method.name]
    command += ["--seeds", str(seed), "--processes", str(options.processes)]
    command += ["--runs", str(options.runs), "--rounds", str(options.rounds), "--most", str(options.most)]
    command += ["--steps", str(options.steps), *(["--cuda"] if options.cuda else [])]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def result_of(protocol: Protocol, method: Method, seed: int, options: argparse.Namespace) -> Path:
    from benchmarks.accuracy.run import result_path

    return result_path(method, seed, options.runs / protocol.name, cuda=options.cuda)


def forget(protocol: Protocol, method: Method, seed: int, options: argparse.Namespace) -> None:
    """Remove a finished run, with what a kill has left of its state; one that isn't finished goes on."""
    from benchmarks.accuracy.run import state_path

    if finished(protocol, method, seed, options):
        result_of(protocol, method, seed, options).unlink()
        folder = options.runs / protocol.name
        shutil.rmtree(state_path(protocol, method, seed, folder, cuda=options.cuda), ignore_errors=True)


def finished(protocol: Protocol, method: Method, seed: int, options: argparse.Namespace) -> bool:
    """Whether a run with just these settings is there."""
    path = result_of(protocol, method, seed, options)
    return path.exists() and json.loads(path.read_text())["key"] == protocol.key(method, seed, cuda=options.cuda)


def results(protocol: Protocol, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All finished runs of the table's rows and seeds; those of other settings are marked `stale`."""
    found = []
    for method in protocol.methods:
        for seed in protocol.seeds:
            path = result_of(protocol, method, seed, options)
            if path.exists():
                run = json.loads(path.read_text())
                run.pop("stale", None)
                same = run["key"] == protocol.key(method, seed, cuda=options.cuda)
                found.append(run if same else {**run, "stale": True})
    return found


def stored(protocol: Protocol) -> dict[str, Any]:
    """The committed results of a table."""
    path = RESULTS / f"{protocol.name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": [], "machine": ""}
    return found


def restore(protocol: Protocol, options: argparse.Namespace) -> None:
    """Put runs of the committed results where this checkout has none of that row and seed."""
    committed = stored(protocol)
    rows = {m.name: m for m in protocol.methods}
    for run in whole(committed["runs"]):
        target = result_of(protocol, rows[run["method"]], run["seed"], options) if run["method"] in rows else None
        if target is not None and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps({"machine": committed["machine"], **run}))


def save(protocol: Protocol, options: argparse.Namespace) -> None:
    """Write the runs that there are and what they come to: a table's results, or what a look has found."""
    from benchmarks.accuracy.run import commit

    runs = results(protocol, options)
    if not runs:
        return
    machines = " and ".join(sorted({r["machine"] for r in runs}))
    header = {"date": time.strftime("%Y-%m-%d"), "machine": machines, "versions": versions(), "code": commit()}
    body = {**header, "changes": protocol.changes, **report.figures(protocol, runs), "runs": slim(runs)}
    path = (options.runs if protocol.changes else RESULTS) / f"{protocol.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body) + "\n")
    if protocol.changes:
        print(json.dumps(body["table"], indent=1))
    else:
        tables.write(tables.ROOT)


def summarise(protocols: Sequence[Protocol]) -> None:
    """Write the verdicts of several tables' committed results, and what the judging half says."""
    from benchmarks.accuracy.halves import JUDGING

    found = {p.name: (p, whole(stored(p)["runs"])) for p in protocols}
    judged = [{"title": p.title, **{r["method"]: r for r in stored(p).get("table", ())}} for p in JUDGING]
    for name, body in {"summary": report.summary(found), "judging": {"tables": judged}}.items():
        (RESULTS / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n")
    tables.write(tables.ROOT)


def slim(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs without what no page shows: losses, counts of samples, what devices measured in an earlier round."""
    kept = ("accuracy_after", "accuracy_average", "accuracy_before", "accuracy_validation")
    out = []
    for run in runs:
        rounds: list[dict[str, Any]] = []
        before: dict[str, Any] = {}
        for row in run["rounds"]:
            own = {k: v for k, v in row["own"].items() if k in kept}
            measured = {k: v for k, v in row["measured"].items() if not k.endswith("_loss")}
            rounds.append({**row, "measured": measured, "own": {} if own == before else own})
            before = own
        out.append({**run, "rounds": rounds})
    return out


def whole(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs as they were before `slim`, but for what no page shows."""
    out = []
    for run in runs:
        rounds: list[dict[str, Any]] = []
        for row in run["rounds"]:
            rounds.append(row if row["own"] or not rounds else {**row, "own": rounds[-1]["own"]})
        out.append({**run, "rounds": rounds})
    return out


def versions() -> dict[str, str]:
    names = ("fedprune", "numpy", "onnxruntime", "torch")
    return {"Python": platform.python_version(), **{n: version(n) for n in names if find_spec(n) is not None}}


if __name__ == "__main__":
    sys.exit(main())
