"""Kills server, boards and broker at flushes to the disk, and compares the updates that counted with those sent.

`python benchmarks/kills.py [--kills 500]`: needs Mosquitto and a C compiler. Every job has two boards that train and
goes through the rounds that one without any kill went through; each of its models must be that one's, bit for bit.

`--neighbours` kills a server's PostgreSQL, and another server's helpers, instead (`--kills 40` of each); the results of
the other runs stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from synthetic_nets import RESULTS, setting, write

from support.faults.kill_neighbours import BACKEND, HELPER, POSTMASTER, DoomedNeighbours, strike
from support.faults.kill_points import BOARDS, Doomed, Kills, check, run, undisturbed
from support.processes.postgres import Postgres
from support.processes.real_site import write_material

JOBS = 5
NEIGHBOURS_ROUNDS = 150
"""Rounds of a job with `--neighbours`: more than it reaches."""


def main() -> int:
    """Run the jobs; returns 1 where a ledger is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, metavar="N", help="processes to kill (default: 500, or 40 of each kind)")
    parser.add_argument("--neighbours", action="store_true", help="kill the server's database and helpers")
    parser.add_argument("--no-page", action="store_true", help="print the numbers and leave the results as they are")
    options = parser.parse_args()
    path = RESULTS / "kills.json"
    body = json.loads(path.read_text()) if path.exists() else {"jobs": [], "ledgers": []}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_material(folder, dict.fromkeys(BOARDS, 200))
        if options.neighbours:
            body["neighbours"] = neighbours(folder, options.kills or 40)
        else:
            body |= at_flushes(folder, options.kills or 500)
    if options.no_page:
        print(page(body))
    else:
        write("kills", body, page(body))
    return 0


def at_flushes(folder: Path, kills: int) -> dict[str, Any]:
    """Kill server, boards and broker."""
    sites = [_site(folder, f"job{job}", kills) for job in range(JOBS)]
    done = [_struck(site, kills, job) for job, site in enumerate(sites)]
    jobs = [{"broker": d.brokers, "lives": [vars(x) for x in d.lives]} for d in done]
    return {"setting": _setting(), "jobs": jobs, "ledgers": _ledgers(sites, done, _site(folder, "calm", kills))}


def _struck(site: Doomed, kills: int, job: int) -> Kills:
    try:
        done = run(site, -(-kills // JOBS), seed=job)
    finally:
        site.stop_all()
    print(json.dumps({"kills": done.total, "seconds": done.seconds, "rounds": done.rounds}), flush=True)
    return done


def _ledgers(sites: list[Doomed], done: list[Kills], calm: Doomed) -> list[dict[str, Any]]:
    """Compare jobs with an undisturbed one, of as many rounds as the longest of them."""
    undisturbed(calm, max(d.rounds for d in done) + 1)
    return [check(site, calm, 1) for site in sites]


def neighbours(folder: Path, kills: int) -> dict[str, Any]:
    """Kill a server's database, and another server's helpers."""
    for name in ("left", "struck", "helped"):
        (folder / name).mkdir()
    calm = DoomedNeighbours(folder, folder / "left", NEIGHBOURS_ROUNDS)
    database = Postgres()
    try:
        database.start()
        sites = (
            (DoomedNeighbours(folder, folder / "struck", NEIGHBOURS_ROUNDS, database.database()), database),
            (DoomedNeighbours(folder, folder / "helped", NEIGHBOURS_ROUNDS, workers=2), None),
        )
        done = []
        for seed, (site, server) in enumerate(sites):
            try:
                done.append(strike(site, kills, seed, database=server))
            finally:
                site.stop_all()
            print(json.dumps({"killed": dict(done[-1].killed), "seconds": done[-1].seconds}), flush=True)
        undisturbed(calm, max(d.rounds for d in done) + 1)
        jobs = [
            {"killed": dict(d.killed), "seconds": d.seconds, "ledger": check(site, calm, 1)}
            for d, (site, _) in zip(done, sites, strict=True)
        ]
    finally:
        database.close()
    return {"setting": _setting() | {"psycopg": setting("psycopg")["psycopg"], "commit": _commit()}, "jobs": jobs}


def _site(folder: Path, name: str, rounds: int) -> Doomed:
    """A site whose job has more rounds than it reaches: a round takes several lives."""
    (folder / name).mkdir()
    return Doomed(folder, folder / name, rounds)


def _setting() -> dict[str, Any]:
    return setting("paho-mqtt", "SQLAlchemy", "onnxruntime")


def _commit() -> str:
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "no commit"


def page(body: dict[str, Any]) -> str:
    """The results as a page."""
    lines = ["# Kills", "", *(_flushes_page(body) if body["jobs"] else ())]
    return "\n".join([*lines, *(_neighbours_page(body["neighbours"]) if "neighbours" in body else ())]) + "\n"


def _machine(about: dict[str, Any]) -> str:
    return (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores (load {about['load']}), Python {about['python']}, "
        f"paho-mqtt {about['paho-mqtt']}, SQLAlchemy {about['SQLAlchemy']}, onnxruntime {about['onnxruntime']}"
    )


def _flushes_page(body: dict[str, Any]) -> list[str]:
    lives = [life for job in body["jobs"] for life in job["lives"]]
    broker = sum(job["broker"] for job in body["jobs"])
    places = Counter((x["who"] if x["who"] == "server" else "board", x["file"], x["after"]) for x in lives)
    rows = sorted({(who, file) for who, file, _ in places})
    what = (
        f"{len(lives) + broker} processes were killed in {len(body['jobs'])} jobs of two boards that train, "
        f"{broker} of them brokers at any time, the others at a flush to the disk. "
        "Every job's rounds are those of an undisturbed job: the same models, bit for bit. No update was lost, "
        "none counted twice."
    )
    why = (
        "Boards announce an update again after each kill of the board, the server or the broker, and the server "
        "accepts it again. A board that is killed in between may receive no acceptance."
    )
    kills = [f"| {who} | {file} | {places[who, file, False]} | {places[who, file, True]} |" for who, file in rows]
    kills.append(f"| broker | (any time) | {broker} | |")
    jobs = [
        f"| {n} | {x['rounds']} | {x['counted']} | {x['sent']} | {x['accepted']} |"
        for n, x in enumerate(body["ledgers"], 1)
    ]
    lines = [f"{_machine(body['setting'])}. `python benchmarks/kills.py`", "", what, ""]
    lines += ["| process | file being flushed | killed before | killed after |", "|---|---|---:|---:|", *kills, ""]
    lines += ["| job | rounds | updates counted | announced by boards | acceptances received |"]
    return [*lines, "|---:|---:|---:|---:|---:|", *jobs, "", why]


def _neighbours_page(body: dict[str, Any]) -> list[str]:
    about = body["setting"]
    versions = f"{_machine(about)}, psycopg {about['psycopg']}, commit {about['commit']}"
    machine = f"{versions}. `python benchmarks/kills.py --neighbours`"
    what = (
        "Server and boards stay alive, and the server's database or helpers are killed (kill -9) at random moments, "
        "0.05 to 0.8 seconds after the last kill. The benchmark restarts the database after a kill of its first "
        "process; after other kills it restarts itself. Both jobs' rounds are those of an undisturbed job with SQLite "
        "in one process: the same models, bit for bit. No update was lost, none counted twice."
    )
    lines = ["", "## The server's database and helpers", "", machine, "", what, ""]
    lines += ["| process | killed | rounds | updates counted | announced by boards | acceptances received |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for job in body["jobs"]:
        ledger = job["ledger"]
        counts = f"{ledger['rounds']} | {ledger['counted']} | {ledger['sent']} | {ledger['accepted']}"
        for who in (POSTMASTER, BACKEND, HELPER):
            if who in job["killed"]:
                lines.append(f"| {who} | {job['killed'][who]} | {counts} |")
                counts = "as above | | |"
    return lines


if __name__ == "__main__":
    sys.exit(main())
