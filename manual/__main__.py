"""`python -m manual`: write all that is made from the code; `--check` says what is not up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from manual import pictures
from manual.written import stale, write

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run the command line; 0 if all is up to date."""
    parser = argparse.ArgumentParser(
        prog="python -m manual", description="Write what the code says of itself into docs/."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if a file is not up to date")
    if parser.parse_args().check:
        found = stale(ROOT)
        for name in found:
            print(f"{name} is not what the code says. Run `python -m manual`.", file=sys.stderr)
        old = pictures.stale(ROOT)
        for name, source in old.items():
            print(f"{name} doesn't show benchmarks/results/{source.results}. Run `{source.command}`.", file=sys.stderr)
        return int(bool(found or old))
    for name in write(ROOT):
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
