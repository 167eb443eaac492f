"""Damaged inputs through parsers, and what each parser did: took it, refused it in words, or something else."""

import random
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from support.faults.input_mutations import mutate
from support.faults.parser_target import Target

LONGEST_MESSAGE = 4000  # characters of an error: what is hostile must not fill a log

SAMPLED = 40  # of so many inputs the memory of one is measured, which makes it a few times slower


@dataclass
class Tally:
    """What became of a parser's inputs.

    Attributes:
        inputs: How many there were.
        taken: How many were taken.
        refused: How many were refused, by the error's class.
        slowest: Most seconds of the processor for one input, its number and its size.
        peak: Most bytes of memory above what the parser is allowed, at its worst: bytes, allowed, number, size.
        findings: Other ends, with the first input's number.
    """

    inputs: int = 0
    accepted_count: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, int, int] = (0.0, -1, 0)
    peak: tuple[int, int, int, int] = (0, 1, -1, 0)
    seconds: float = 0.0
    findings: dict[str, int] = field(default_factory=dict)


def case(target: Target, number: int) -> bytes:
    """The input of a number: always the same."""
    return target.frame(mutate(target.seeds, random.Random(f"{target.name} {number}"), text=target.text))


def fuzz(target: Target, first: int, count: int, tally: Tally | None = None) -> Tally:
    """Give a parser some of its inputs."""
    tally = tally or Tally()
    for number in range(first, first + count):
        raw = case(target, number)
        tally.inputs += 1
        if number % SAMPLED == 0:
            _memory(target, raw, number, tally)
        else:
            _run(target, raw, number, tally)
    return tally


def _run(target: Target, raw: bytes, number: int, tally: Tally) -> None:
    begun = time.thread_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.parse(raw)
        tally.accepted_count += 1
    except target.errors as error:
        tally.refused[type(error).__name__] += 1
        if len(str(error)) > LONGEST_MESSAGE:
            tally.findings.setdefault(f"a message of {len(str(error)) // 1000} thousand characters", number)
    except Exception as error:  # noqa: BLE001  that is what we look for
        tally.findings.setdefault(_place(error), number)
    took = time.thread_time() - begun
    tally.seconds += took
    if took > tally.slowest[0]:
        tally.slowest = (took, number, len(raw))


def _memory(target: Target, raw: bytes, number: int, tally: Tally) -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        quiet = Tally()
        _run(target, raw, number, quiet)
        used = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    tally.accepted_count += quiet.accepted_count
    tally.refused += quiet.refused
    for what, which in quiet.findings.items():
        tally.findings.setdefault(what, which)
    allowed = target.bound(len(raw))
    if used / allowed > tally.peak[0] / tally.peak[1]:
        tally.peak = (used, allowed, number, len(raw))
    if used > allowed:
        tally.findings.setdefault(f"memory beyond the bound: {target.name}", number)


def _place(error: BaseException) -> str:
    ours = [
        f for f in traceback.extract_tb(error.__traceback__) if "fedprune" in f.filename and "/tests/" not in f.filename
    ]
    at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    text = str(error) if len(str(error)) < 10_000 else "a long message"
    return f"{type(error).__name__} at {at}: {text.splitlines()[0][:100] if text else ''}"
