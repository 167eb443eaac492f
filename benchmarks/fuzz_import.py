"""Damaged models through the importer: `python benchmarks/fuzz_import.py --minutes 5`.

Small sound models are damaged in their bytes and in their structure and imported in child processes of bounded memory.
An import may succeed or end in one of our errors. Anything else is a finding: another exception, a dead process, too
much memory, or more than `SECONDS` for one model. An error that only the importer's safety net caught is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from synthetic_nets import setting, write

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

MEMORY = 6 * 2**30
"""Address space of a child, most of which is libraries."""

SECONDS = 20
"""What one model may take."""


def case(seed: int) -> tuple[str, bytes]:
    from support.faults.model_mutations import damaged
    from support.nets.model_corpus import corpus

    rng, models = np.random.default_rng(seed), corpus()
    name = sorted(models)[rng.integers(len(models))]
    return name, damaged(models[name], rng)


def outcome(raw: bytes) -> dict[str, Any]:
    """What became of a model."""
    from fedprune.core.errors import FedpruneError
    from fedprune_export.importing import import_onnx

    try:
        import_onnx(raw, "net")
    except FedpruneError as error:
        if len(str(error)) > 2000:
            return {"kind": "finding", "what": f"a message of {len(str(error))} characters"}
        caught = error.__cause__ if "can't be understood" in str(error) else None
        if caught is not None:
            return {"kind": "net", "what": _place(caught)}
        return {"kind": "checker" if re.search("not (a whole|valid) ONNX", str(error)) else "refused"}
    except BaseException as error:  # noqa: BLE001  that is what we look for
        return {"kind": "finding", "what": _place(error)}
    return {"kind": "imported"}


def _place(error: BaseException) -> str:
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "fedprune" in f.filename]
    at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {at}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def child(start: int, stop: int) -> None:
    """Run cases and say of each what became of it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for seed in range(start, stop):
        print(json.dumps({"begin": seed}), flush=True)
        name, raw = case(seed)
        begun = time.monotonic()
        found = outcome(raw)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps({"seed": seed, "net": name, "s": time.monotonic() - begun, "mb": peak, **found}), flush=True)


def run(start: int, stop: int, until: float) -> list[dict[str, Any]]:
    """Cases in child processes; one that dies or hangs is a finding, and the next child continues after it."""
    rows: list[dict[str, Any]] = []
    while start < stop and time.monotonic() < until:
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", str(start), str(min(stop, start + 400))],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        pending, seed, last = b"", start, time.monotonic()
        hung = False
        while True:
            data = process.stdout.read() or b""
            pending += data
            *lines, pending = pending.split(b"\n")
            for line in lines:
                entry = json.loads(line)
                last = time.monotonic()
                if "begin" in entry:
                    seed = entry["begin"]
                else:
                    rows.append(entry)
                    seed = entry["seed"] + 1
            if process.poll() is not None and not data:
                break
            if time.monotonic() - last > SECONDS + 10 * (seed == start):
                process.send_signal(signal.SIGKILL)
                hung = True
            time.sleep(0.05)
        if process.returncode:
            what = f"more than {SECONDS} s" if hung else f"process ended with {process.returncode}"
            rows.append({"seed": seed, "net": case(seed)[0], "s": 0, "mb": 0, "kind": "finding", "what": what})
            seed += 1
        start = seed
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--child", type=int, nargs=2)
    parser.add_argument("--dry", action="store_true", help="print findings, write no page")
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    begun = time.monotonic()
    rows = run(arguments.first, arguments.first + arguments.cases, begun + 60 * arguments.minutes)
    kinds = Counter(r["kind"] for r in rows)
    findings = Counter(r["what"] for r in rows if r["kind"] == "finding")
    nets = Counter(r["what"] for r in rows if r["kind"] == "net")
    for title, counter in (("finding", findings), ("net", nets)):
        for what, n in counter.most_common():
            seeds = [r["seed"] for r in rows if r.get("what") == what][:3]
            print(f"{title} {n} x {what} (seeds {', '.join(map(str, seeds))})")
    print(dict(kinds))
    if arguments.dry:
        return
    about, times = setting("onnx", "onnxruntime"), np.array([r["s"] for r in rows])
    lines = [
        "# Fuzzing the importer",
        "",
        (
            f"{about['date']}, {about['cpu']}, Python {about['python']}, onnx {about['onnx']}, onnxruntime "
            f"{about['onnxruntime']}. `python benchmarks/fuzz_import.py --minutes {arguments.minutes:g}`"
        ),
        "",
        (
            f"{len(rows)} damaged models (seeds from {arguments.first}) of {len({r['net'] for r in rows})} kinds in "
            f"{(time.monotonic() - begun) / 60:.1f} minutes, each child process held to {MEMORY // 2**30} GiB of "
            f"address space and {SECONDS} s a model."
        ),
        "",
        "| outcome | models |",
        "|---|---|",
        f"| imported: the damage did no harm | {kinds['imported']} |",
        f"| refused by onnx's checker | {kinds['checker']} |",
        f"| refused by what comes after it | {kinds['refused']} |",
        f"| refused by the net below all checks | {kinds['net']} |",
        f"| findings: other exceptions, dead or slow processes | {kinds['finding']} |",
        "",
        (
            f"Time per model: median {np.median(times) * 1e3:.0f} ms, 99th percentile "
            f"{np.percentile(times, 99) * 1e3:.0f} ms, most {times.max():.1f} s. Largest peak memory of a child "
            f"{max(r['mb'] for r in rows)} MB."
        ),
    ]
    counts = {"kinds": kinds, "findings": findings, "net": nets}
    body = {"setting": about, "first": arguments.first, "cases": len(rows), **counts}
    body |= {"median_s": float(np.median(times)), "most_s": float(times.max()), "most_mb": max(r["mb"] for r in rows)}
    write("fuzz_import", body, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
