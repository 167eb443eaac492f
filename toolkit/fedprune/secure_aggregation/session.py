"""One secure sum's settings, and the graph of the boards that mask together.

Boards mask in pairs along the edges of a graph in which each has k neighbours (Bell et al. 2020), and share their
secrets with the same neighbours. Boards are placed on a circle in random order, and a board's neighbours are the k/2
on either side; with k + 1 boards or fewer, all others (Bonawitz et al. 2017).

Such a graph stays connected until k boards are removed (Harary 1962). So, wherever they are on the circle:

- fewer than t colluding boards can't restore a secret of an honest one;
- up to k − t boards may drop out, and every secret that is needed can be restored;
- while colluding and absent boards are fewer than k in all, the masks between the remaining ones join them all, and the
  server learns nothing but the sum of them all.

`SecureSumSession.choose` takes the smallest k at which more than these fail with negligible probability.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from fedprune.core.errors import ConfigError, ProtocolError, value_text
from fedprune.core.json_file import decode_json
from fedprune.core.validation import check_whole
from fedprune.security.keys import transcript

# Fewest boards of a sum: of two boards, each knows the other's update.
MIN_BOARDS = 3

MAX_BOARDS = 100_000
MAX_CONTEXT_BYTES = 1024
MAX_WORDS = 2**31  # numbers of a vector, of each size
_MAX_TASK_LENGTH = 64  # a sha256 in hexadecimal
_DOMAIN = "fedprune secure sum 1"
# Probability that colluding and absent boards are placed so that the server learns more than the sum.
_MAX_EXPOSURE_PROBABILITY = 2.0**-40
# Probability that absent boards are placed so that the sum is lost.
_MAX_LOSS_PROBABILITY = 2.0**-20


@dataclass(frozen=True)
class SecureSumSession:
    """The settings of one secure sum, which all parties know before it begins.

    Attributes:
        context: Identifies the sum: job, round, attempt, selection. No two sums have the same.
        degree: k, the largest number of neighbours; a circle needs an even one.
        threshold: t, the number of shares that restore a secret. It is more than k/2, so that no secret's holders can
            be divided into two parts that each restore one.
        narrow: Numbers of 32 bits in a vector.
        wide: Numbers of 64 bits in a vector.
        task: Digest of what all boards of the sum are asked for (`task_digest`). Boards sign it with their keys, so
            that a server can't ask one board for more than the others.
    """

    context: bytes
    degree: int
    threshold: int
    narrow: int
    wide: int
    task: str = ""

    def __post_init__(self) -> None:
        subject = "secure sum: {}".format
        check_whole(subject("bytes of the context"), len(self.context), 1, MAX_CONTEXT_BYTES, error=ProtocolError)
        check_whole(subject("degree"), self.degree, 2, MAX_BOARDS - 1, error=ProtocolError)
        if self.degree % 2:
            raise ProtocolError(subject("degree"), expected="an even number", got=self.degree)
        check_whole(subject("threshold"), self.threshold, self.degree // 2 + 1, self.degree, error=ProtocolError)
        for name in ("narrow", "wide"):
            check_whole(subject(f"{name} numbers"), getattr(self, name), 0, MAX_WORDS, error=ProtocolError)
        if not isinstance(self.task, str) or len(self.task) > _MAX_TASK_LENGTH:
            raise ProtocolError(subject("task"), expected="a digest", got=value_text(self.task))

    @classmethod
    def choose(
        cls,
        context: bytes,
        boards: int,
        narrow: int,
        wide: int,
        *,
        task: str = "",
        dropping: float = 0.2,
        colluding: float = 0.1,
    ) -> SecureSumSession:
        """The session of least degree for a number of boards, with a threshold of just over half of it.

        Raises `ConfigError` if no degree suffices: fewer than three boards, or too many that drop out or collude.
        `dropping` is the share of boards that may drop out after the keys are known, `colluding` of those that may tell
        the server all that they know.
        """
        check_whole("boards of a secure sum", boards, MIN_BOARDS, MAX_BOARDS)
        dropouts, colluders = math.ceil(dropping * boards), math.ceil(colluding * boards)
        for degree in range(2, boards + 1, 2):
            threshold, neighbours = degree // 2 + 1, min(degree, boards - 1)
            if neighbours < threshold:
                continue
            # Union bounds: any of the boards may be the one whose neighbours drop out or collude.
            loss_probability = boards * _tail_probability(neighbours - threshold + 1, boards - 1, dropouts, neighbours)
            exposure_probability = boards * _tail_probability(threshold, boards - 1, colluders, neighbours)
            if (
                loss_probability <= _MAX_LOSS_PROBABILITY
                and exposure_probability + _division_probability(boards, dropouts + colluders, neighbours)
                <= _MAX_EXPOSURE_PROBABILITY
            ):
                return cls(context, degree, threshold, narrow, wide, task)
        raise ConfigError(
            "boards of a secure sum",
            expected=f"enough that {dropouts} may drop out and {colluders} collude",
            got=boards,
            hint="Fewer than half may drop out, or collude.",
        )

    def to_bytes(self) -> bytes:
        """As boards are sent it: JSON."""
        return json.dumps({**asdict(self), "context": self.context.hex()}, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> SecureSumSession:
        """Read what `to_bytes` gives. Raises `ProtocolError`."""
        try:
            body = decode_json(raw)
            return cls(**{**body, "context": bytes.fromhex(body["context"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProtocolError(
                "settings of a secure sum", expected="JSON of its settings", got=value_text(raw)
            ) from error

    @property
    def digest(self) -> bytes:
        """The value that keys and signatures of this sum are bound to."""
        text = transcript(_DOMAIN, self.context, self.degree, self.threshold, self.narrow, self.wide, self.task)
        return hashlib.sha256(text).digest()

    @property
    def size(self) -> int:
        """Bytes of a vector."""
        return 4 * self.narrow + 8 * self.wide

    def neighbours(self, boards: Sequence[str], random: Random) -> dict[str, tuple[str, ...]]:
        """Each board's neighbours, sorted, on a circle in random order. Raises `ProtocolError` if there are too few
        boards."""
        if len(boards) <= self.threshold:
            raise ProtocolError("boards of a secure sum", expected=f"more than {self.threshold}", got=len(boards))
        # In an order of its own: shuffled from any other, the same random numbers would give another circle.
        circle = sorted(boards)
        if len(circle) <= self.degree + 1:
            return {name: tuple(n for n in circle if n != name) for name in circle}
        random.shuffle(circle)
        count, reach = len(circle), self.degree // 2
        steps = [*range(-reach, 0), *range(1, reach + 1)]
        return {name: tuple(sorted(circle[(i + s) % count] for s in steps)) for i, name in enumerate(circle)}


def task_digest(selection: str, weights: str, recipe: Mapping[str, Any], secure: Mapping[str, Any]) -> str:
    """Digest of what all boards of a sum are asked for: the channels, the weights that were sent, how the update
    becomes numbers, and the recipe. With another learning rate or step, the other boards' numbers could be 0, and the
    sum that of a single board.

    The parts of a batch (`accumulate`) don't matter: boards with little memory work through more of them.
    """
    shared = {name: value for name, value in recipe.items() if name != "accumulate"}
    text = json.dumps([selection, weights, shared, dict(secure)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _tail_probability(min_marked: int, population: int, marked: int, drawn: int) -> float:
    """The probability that at least `min_marked` of `drawn` boards are marked, if `marked` of the `population` are
    (hypergeometric)."""
    favourable = sum(
        math.comb(marked, i) * math.comb(population - marked, drawn - i)
        for i in range(min_marked, min(marked, drawn) + 1)
    )
    return favourable / math.comb(population, drawn)


def _division_probability(boards: int, removed: int, degree: int) -> float:
    """A bound of the probability that removed boards cut the circle in two: for this they fill two arcs of k/2 each."""
    if removed < degree or boards <= degree + 1:
        return 0.0
    return math.comb(boards, 2) * math.prod((removed - i) / (boards - i) for i in range(degree))
