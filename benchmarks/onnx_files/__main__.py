"""ONNX files as people have them, imported, cut and trained: `python -m benchmarks.onnx_files`.

First files are made that aren't there: by this Python, and by every further one that `--python` names, since the
exporters of TensorFlow and Paddle don't go together with torch's. What isn't installed is skipped and named. Then every
file is judged (`census.py`) in a process of its own pool: a crash or an endless import is a record, too. Records are
kept by the file's digest and the code's: the same command continues, and `--failed` runs only what wasn't as expected.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, parser, save, setting
from benchmarks.onnx_files.census import judge

MAKERS = ("torch", "onnxruntime", "keras", "sklearn", "paddle")
PACKAGES = ("onnx", "onnxruntime", "torch")
TIMEOUT_S = 180


class Judge:
    """One worker process, which is replaced where a file ends it or takes too long."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def record(self, folder: Path, name: str) -> dict[str, Any]:
        self._pool = self._pool or ProcessPoolExecutor(1, get_context("spawn"))
        future = self._pool.submit(judge, folder, name)
        try:
            return future.result(TIMEOUT_S)
        except BrokenProcessPool:
            error = "the process ended"
        except FutureTimeoutError:
            error = f"no end after {TIMEOUT_S} s"
            for process in (self._pool._processes or {}).values():
                process.kill()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None
        return {"verdict": "crashed", "error": error, "as_expected": False}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def digest(*paths: Path) -> str:
    """A digest of files."""
    checksum = hashlib.sha256()
    for path in sorted(paths):
        checksum.update(path.read_bytes())
    return checksum.hexdigest()[:16]


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--files", type=Path, default=Path("build/onnx_files"), help="the folder of the files")
    command.add_argument("--python", action="append", default=[], help="a further interpreter that makes files")
    command.add_argument("--judge", action="store_true", help="make no files")
    command.add_argument("--failed", action="store_true", help="judge only files whose record isn't as expected")
    options = command.parse_args()
    for python in [] if options.judge else [sys.executable, *options.python]:
        for maker in MAKERS:
            module = f"benchmarks.onnx_files.make_{maker}"
            subprocess.run([python, "-m", module, "--files", str(options.files)], cwd=ROOT, check=False)
    out = options.out or RESULTS / "onnx_files.json"
    records = {} if options.anew or not out.exists() else {r["file"]: r for r in json.loads(out.read_text())["rows"]}
    code = digest(*(p for room in ("export", "toolkit", "benchmarks/onnx_files") for p in (ROOT / room).rglob("*.py")))
    names = sorted(path.stem for path in options.files.glob("*.json"))
    wanted = [n for n in names if all(key == "file" and value in n for key, value in options.only)]
    records = {name: record for name, record in records.items() if name in names}
    worker, began = Judge(), time.monotonic()
    for number, name in enumerate(wanted, start=1):
        key = {"digest": digest(options.files / f"{name}.onnx", options.files / f"{name}.json"), "code": code}
        old = records.get(name, {})
        is_kept = old.get("as_expected") and options.failed
        if old.get("digest") == key["digest"] and (old.get("code") == code or is_kept):
            continue
        record = worker.record(options.files, name)
        records[name] = {"file": name, **key, **record, "made": setting(*PACKAGES)}
        said = record["verdict"] + ("" if record["as_expected"] else f": {record.get('error', '')}"[:200])
        print(
            f"{number} of {len(wanted)}, {time.monotonic() - began:.0f} s: {name}: {said}", file=sys.stderr, flush=True
        )
        if number % 10 == 0:
            _save(out, records)
    worker.close()
    _save(out, records)


def _save(out: Path, records: dict[str, dict[str, Any]]) -> None:
    rows = [records[name] for name in sorted(records)]
    verdicts = Counter(row["verdict"] for row in rows)
    counts = {verdict: verdicts[verdict] for verdict in ("trained", "refused", "wrong", "crashed")}
    unclear = sum(row["verdict"] == "refused" and not row.get("way_out") for row in rows)
    save(out, {"setting": setting(*PACKAGES), "files": len(rows), **counts, "unclear": unclear, "rows": rows})


if __name__ == "__main__":
    main()
