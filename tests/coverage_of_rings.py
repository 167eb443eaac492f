"""Compare which branches `make test` covers with those that a push and the soaks cover together.

    make coverage       runs all of them under coverage, children included: some hours

The figure is the share of the branches that any test takes which the quick tests take, too.
"""

import json
import sys
from pathlib import Path


def branches(report: Path) -> set[tuple[str, int, int]]:
    """The branches that were taken, by file, in a JSON report of coverage."""
    files = json.loads(report.read_text())["files"]
    return {(name, start, end) for name, file in files.items() for start, end in file["executed_branches"]}


def main(quick_report: str, *other_reports: str) -> int:
    quick = branches(Path(quick_report))
    every = quick.union(*(branches(Path(report)) for report in other_reports))
    print(f"{len(quick):,} of {len(every):,} branches: {len(quick) / len(every):.1%}")
    missed: dict[str, int] = {}
    for name, _, _ in every - quick:
        missed[name] = missed.get(name, 0) + 1
    for name, count in sorted(missed.items(), key=lambda row: -row[1])[:20]:
        print(f"{count:6,} more in {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
