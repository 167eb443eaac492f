"""Runs of a long benchmark, kept one by one: what was interrupted continues with the next."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, TypeVar

from synthetic_nets import RESULTS

Case = TypeVar("Case")


def kept_runs(
    name: str, title: str | None, cases: Iterable[Case], run: Callable[[Case], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of all cases that there are, after running those that the command line's limits allow.

    Args:
        name: Of the results' file, in which every finished row is kept at once.
        title: What the benchmark is; its first line is shown by `--help`.
        cases: Dataclasses; a row has its case's fields.
        run: Runs a case; gives its row.
    """
    parser = argparse.ArgumentParser(description=(title or "").splitlines()[0])
    parser.add_argument("--anew", action="store_true", help="forget earlier runs")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no run after so many minutes")
    arguments = parser.parse_args()
    path, began, wanted = RESULTS / f"{name}.json", time.monotonic(), list(cases)
    known = json.loads(path.read_text())["rows"] if path.exists() and not arguments.anew else []
    for case in wanted:
        if any(_fields(case) <= row.items() for row in known):
            continue
        if time.monotonic() - began > 60 * arguments.minutes:
            break
        known.append(run(case))
        print({k: v for k, v in known[-1].items() if not isinstance(v, list)}, flush=True)
        path.write_text(json.dumps({"rows": known}) + "\n")
    return [row for case in wanted for row in known if _fields(case) <= row.items()]


def _fields(case: Any) -> Any:
    return asdict(case).items()
