"""Differential privacy of boards' updates: a job's settings, the noise, and the cost of a number of releases.

Two fleets are neighbouring if they differ in one board, which has its samples in one of them and none in the other,
where it would return what it received. The board takes part in both. `docs/privacy.md` derives what is promised.

With Δ = w_trained − w_received over all trained tensors that the board shares, it sends

    w_received + min(1, C/|Δ|)·Δ + s·z,   z ~ N(0, 1) per element,

rounded to float32. C and s are the recipe's `update_clip` and `update_noise`. Batch-norm statistics, which are measured
on the samples and have no bound, come back as they were received.

Releases with noise multipliers z_1, z_2, ..., each chosen with knowledge of the earlier ones, cost as much as a single
one with multiplier 1/μ, μ² = Σ 1/z² (Dong et al. 2019, Corollary 3.3). Its δ at an ε is

    δ(ε) = Φ(μ/2 − ε/μ) − e^ε·Φ(−μ/2 − ε/μ)

(Balle and Wang 2018, Theorem 8). If the second term is too small for a float, it counts as 0, which never makes the
cost too small. There is no discount for devices that a round doesn't ask (no amplification by sampling).
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedprune.core import validation
from fedprune.core.errors import ConfigError, TrainingError
from fedprune.core.settings import bounded, check_fields, choice_of
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors

LOCAL = "local"
SHARED = "shared"
NOISES = (LOCAL, SHARED)

# Settings of a recipe that are written from these. People can't set them: noise without an account promises nothing.
WRITTEN_SETTINGS = ("update_clip", "update_noise")

# The least noise, in units of the clip: with so little, one release costs an ε of thousands.
MIN_NOISE = 0.01


@dataclass(frozen=True)
class Privacy:
    """Settings of a job's privacy, `[job.privacy]`.

    Attributes:
        clip: The maximum L2 norm of a board's update, over all trained tensors that it shares; 0 turns privacy off.
        noise_multiplier: σ, in units of `clip`.
        noise: `local`: every board adds all of the noise, so that its own update is private, to the server as well.
            `shared`: every board adds a part of it, so that the sum has the noise; the server is trusted.
        boards: With `shared`, the number of boards among which the noise is divided.
        delta: δ of the promise.
        epsilon_budget: The job ends before the round that would take a board beyond this ε; 0 for no end.
    """

    clip: float = bounded(0.0, 0, 1e6)
    noise_multiplier: float = bounded(0.0, MIN_NOISE, 1e4, or_zero=True)
    noise: str = choice_of(LOCAL, NOISES)
    boards: int = bounded(0, 0, 10**6)
    delta: float = bounded(1e-5, 0, 1, above=True, below=True)
    epsilon_budget: float = bounded(0.0, 0, 1e6)

    def __post_init__(self) -> None:
        setting = ("job", "privacy")
        check_fields(self, setting)
        if not self.clip and (self.noise_multiplier or self.epsilon_budget or self.boards):
            raise ConfigError((*setting, "clip"), expected="above 0 with other settings of privacy", got=self.clip)
        if self.epsilon_budget and not self.noise_multiplier:
            raise ConfigError(
                "without noise_multiplier",
                path=(*setting, "epsilon_budget"),
                expected="noise_multiplier above 0",
                got=self.noise_multiplier,
                hint="Clipping alone promises nothing.",
            )
        if self.clip and (self.noise == SHARED) != (self.boards > 0):
            raise ConfigError(
                f"with noise {self.noise!r}",
                path=(*setting, "boards"),
                expected="1 or more, the boards that share the noise out" if self.noise == SHARED else "0",
                got=self.boards,
            )

    @property
    def is_on(self) -> bool:
        """Whether boards clip at all."""
        return self.clip > 0

    @property
    def is_local(self) -> bool:
        """Whether every board adds all of the noise."""
        return self.noise == LOCAL

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise that a board adds to every element of its update."""
        total_noise = self.noise_multiplier * self.clip
        return total_noise if self.is_local else total_noise / math.sqrt(self.boards)

    @property
    def account_settings(self) -> dict[str, Any]:
        """The settings that determine what a release costs, and the budget, as plain JSON types."""
        return {k: getattr(self, k) for k in ("noise_multiplier", "noise", "boards", "delta", "epsilon_budget")}

    def private_recipe(self, recipe: Recipe) -> Recipe:
        """A board's recipe under these settings. Raises `ConfigError`, by the recipe's own rules, if a setting of the
        recipe would let a board reveal more than its update."""
        return replace(recipe, update_clip=self.clip, update_noise=self.noise_std) if self.is_on else recipe

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; empty if privacy is off."""
        return asdict(self) if self.is_on else {}

    @classmethod
    def from_dict(cls, body: object) -> Privacy:
        """Read and check. Raises `ConfigError`, which names the key, for an unknown key, a wrong type or a number out
        of range."""
        return cls(**validation.check_table(cls, body, ("job", "privacy")))


# Larger than the error of a norm: a block's sum of squares is off by 2^-37 of itself at most, and their sum is exact.
_MARGIN = 1.0 + 2.0**-30

Array = npt.NDArray[Any]


def add_noise(
    update: Mapping[str, Array],
    received: Mapping[str, Array],
    trained: Collection[str],
    clip: float,
    noise: float,
    source: GaussianNoise,
) -> Tensors:
    """An update as it may leave the board: clipped, and with noise.

    If nothing is clipped and there is no noise, trained tensors keep their bits. Raises `TrainingError` if the
    update is not finite.

    Args:
        received: The same tensors as the board received them.
        trained: Names of the tensors that were trained; all others are returned as they were received.
        clip: C, the maximum L2 norm of the update.
        noise: s, the standard deviation of the noise on every element.
    """
    names = [n for n in update if n in trained]
    size = update_norm(update, received, names)
    if not math.isfinite(size):
        raise TrainingError("the update is not finite", got=size)
    factor = 1.0 if size <= clip else clip / size
    private: Tensors = {}
    for name, value in update.items():
        if name not in trained:
            private[name] = np.array(received[name], np.float32)
        elif factor == 1.0 and not noise:
            private[name] = np.asarray(value)
        else:
            private[name] = _clipped_with_noise(value, received[name], factor, noise, source)
    return private


def update_norm(update: Mapping[str, Array], received: Mapping[str, Array], names: Collection[str]) -> float:
    """An upper bound of |Δ| over some tensors, too large by less than a billionth."""
    # An upper bound, because a norm that is rounded down would let an update exceed what the noise is made for.
    squares = []
    with np.errstate(over="ignore", invalid="ignore"):
        for name in names:
            after, before = np.ravel(update[name]), np.ravel(received[name])
            for start in range(0, after.size, BLOCK_LENGTH):
                block = slice(start, start + BLOCK_LENGTH)
                difference = after[block].astype(np.float64) - before[block]
                squares.append(float(np.dot(difference, difference)))
    total = sum(squares)
    return math.sqrt(math.fsum(squares)) * _MARGIN if math.isfinite(total) else math.inf


def _clipped_with_noise(
    after: Array, before: Array, factor: float, noise: float, source: GaussianNoise
) -> npt.NDArray[np.float32]:
    """before + factor·(after − before) + noise, in blocks."""
    shifted = np.empty(after.shape, np.float32)
    shifted_flat, after_flat, before_flat = shifted.reshape(-1), np.ravel(after), np.ravel(before)
    for start in range(0, shifted_flat.size, BLOCK_LENGTH):
        block = slice(start, start + BLOCK_LENGTH)
        base = before_flat[block].astype(np.float64)
        values = base + factor * (after_flat[block] - base)
        if noise:
            values += noise * source.draw(base.size)
        shifted_flat[block] = values
    return shifted


# Deviates that are drawn at once: 512 KiB, so that a board's memory doesn't have to hold the noise of a whole tensor.
BLOCK_LENGTH = 65_536

_KEY_BYTES = 32
_UNIT = 2.0**-53


class GaussianNoise:
    """Standard normal deviates that nobody can predict without the key of 32 bytes. Equal keys give equal deviates.

    Their bits are the key stream of AES-256 in counter mode, turned into normal deviates by Box and Muller (1958).
    numpy's own generators are made for experiments: their state can be computed from their output. A deviate is at most
    8.6 in magnitude, as a uniform number of 53 bits is at least 2^-53; the missing tail is negligible next to any δ.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"a key of {_KEY_BYTES} bytes was expected, got {len(key)}")
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def from_system(cls) -> GaussianNoise:
        """Noise with a key from the operating system's randomness, which is stored nowhere."""
        return cls(secrets.token_bytes(_KEY_BYTES))

    @classmethod
    def from_key(cls, *key: object) -> GaussianNoise:
        """Noise that its key repeats, for simulations, whose runs must be the same every time."""
        return cls(hashlib.sha256("\x1f".join(["noise", *map(str, key)]).encode()).digest())

    def draw(self, count: int) -> npt.NDArray[np.float64]:
        """The next `count` deviates, `BLOCK_LENGTH` at most in one go."""
        pairs = (count + 1) // 2
        bits = np.frombuffer(self._stream.update(bytes(16 * pairs)), "<u8") >> np.uint64(11)
        first, second = bits[:pairs].astype(np.float64), bits[pairs:].astype(np.float64)
        radius = np.sqrt(-2.0 * np.log((first + 1.0) * _UNIT))
        angle = second * (2.0 * np.pi * _UNIT)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


# Bisections: floats run out of bits earlier, which ends the loop.
_MAX_BISECTIONS = 200
# Beyond this e^ε is too large for a float.
_MAX_EXPONENT = 700.0


def delta_for(cost: float, epsilon: float) -> float:
    """δ at an ε of at least 0; `cost` is Σ 1/z², above 0."""
    mu = math.sqrt(cost)
    first, second = _tail(epsilon / mu - mu / 2), _tail(epsilon / mu + mu / 2)
    return first - (math.exp(epsilon) * second if second and epsilon < _MAX_EXPONENT else 0.0)


def epsilon_for(cost: float, delta_: float) -> float:
    """The least ε that holds at a δ; `cost` is Σ 1/z², 0 without a release and infinite for one without noise."""
    if cost <= 0:
        return 0.0
    if not math.isfinite(cost):
        return math.inf
    # An upper bound for any cost: zero-concentrated privacy of ρ = cost/2 (Bun and Steinke 2016, Proposition 1.3).
    low, high = 0.0, cost / 2 + math.sqrt(2 * cost * math.log(1 / delta_))
    if delta_for(cost, 0.0) <= delta_:
        return 0.0
    for _ in range(_MAX_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if delta_for(cost, middle) <= delta_ else (middle, high)
    return high  # the upper end: rounding must not promise too much


def max_cost(epsilon_: float, delta_: float) -> float:
    """The largest Σ 1/z² with which ε is not exceeded; arguments are those of `epsilon_for`."""
    low, high = 0.0, 1.0
    while epsilon_for(high, delta_) <= epsilon_:
        low, high = high, 2 * high
    for _ in range(_MAX_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if epsilon_for(middle, delta_) <= epsilon_ else (low, middle)
    return low


def _tail(value: float) -> float:
    """P(N(0, 1) > value)."""
    return 0.5 * math.erfc(value / math.sqrt(2))
