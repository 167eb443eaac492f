"""Which channels of a group matter most: one score per channel, and the ranks that follow.

The ranking is global: every device gets a prefix of the same ranks, so that narrower submodels lie inside wider ones
(CA-HFP, arXiv 2603.12591, Fig. 1). A channel's score is taken over its *output side*: the weights that make it (a
filter, a row of a linear layer, in every layer that writes to the group), and for the curvature score also its bias
and its norm's γ and β. The weights of the next layer, which read the channel, don't count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError, ConfigError
from fedprune.core.rng import keyed_generator
from fedprune.jobs.job import SCORERS
from fedprune.model.architecture import Architecture, TensorKind
from fedprune.strategies.importance.gradient_stats import Evidence, add_to_channels

# Per group one number per channel; more is better.
Scores = tuple[npt.NDArray[np.float64], ...]

# Per group its channels, best first.
Ranks = tuple[npt.NDArray[np.int64], ...]

CurvatureForm = Literal["abs", "signed"]


def channel_scores(name: str, architecture: Architecture, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Scores:
    """Scores by a scorer's name: `ordered`, `magnitude`, or `curvature` without any evidence, for which all channels
    are equal. Raises `ConfigError` if there is no such scorer, and `BundleError` if tensors don't fit the architecture.
    """
    if name == "ordered":
        return order_scores(architecture)
    if name == "magnitude":
        return magnitude_scores(architecture, tensors)
    if name == "curvature":
        return curvature_scores(architecture, tensors, Evidence.empty(architecture))
    raise ConfigError(f"no scorer is called {name!r}", expected=", ".join(SCORERS))


def order_scores(architecture: Architecture) -> Scores:
    """S_c = −c: channels keep their own order (ordered prefixes; HeteroFL, Diao et al. 2021, eq. 2)."""
    return tuple(-np.arange(n, dtype=np.float64) for n in architecture.sizes)


def magnitude_scores(architecture: Architecture, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Scores:
    """S_c = Σ |w| over the weights that make channel c.

    Filters and linear rows count, biases and norm vectors don't (Li et al. 2017, "Pruning filters for efficient
    ConvNets", Sec. 3.1; the l1 criterion of CA-HFP, Table II). Where several layers write to one group, the sum runs
    over all of them. Raises `BundleError` if tensors don't fit the architecture.
    """

    def part(name: str) -> npt.NDArray[np.float64]:
        return np.abs(_checked_tensor(architecture, tensors, name))

    return channel_sums(architecture, part, (TensorKind.WEIGHT,))


def curvature_scores(
    architecture: Architecture,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    evidence: Evidence,
    form: CurvatureForm = "abs",
) -> Scores:
    """S_c = Σ s_i over the coordinates that make channel c: weights, bias, γ and β (CA-HFP, eq. 15, and its ablations).
    Raises `BundleError` if tensors or evidence don't fit the architecture, or there is no such form.

    Args:
        tensors: The global model w.
        evidence: Estimates of gradient g and curvature h.
        form: `abs`: s = |g·w| + ½·h·w², the size of the second-order change of the loss (eq. 14) when a weight is
            removed; terms of opposite sign don't cancel. `signed`: s = g·w + h·w², eq. 15 to the letter.
    """
    if form not in get_args(CurvatureForm):
        raise BundleError("form of the curvature score", expected="abs or signed", got=repr(form))
    if evidence.architecture.digest != architecture.digest:
        raise BundleError("evidence belongs to another architecture")

    def part(name: str) -> npt.NDArray[np.float64]:
        w = _checked_tensor(architecture, tensors, name)
        second_order: npt.NDArray[np.float64] = evidence.curvature[name] * (w * w)
        first_order = evidence.gradient[name] * w
        return np.abs(first_order) + 0.5 * second_order if form == "abs" else first_order + second_order

    return channel_sums(architecture, part, tuple(k for k in TensorKind if k.is_trainable))


def movement_scores(architecture: Architecture, evidence: Evidence) -> Scores:
    """S_c = Σ |Δw| over the coordinates that make channel c: CA-HFP's `Delta w` criterion (Table II).

    Δw is read from the estimated gradient, a moving average of −Δ / (η_eff · steps). The factor is the same for all
    coordinates, so the ranks are those of Δw. A coordinate that no device trained lately keeps its last estimate.
    Raises `BundleError` if evidence doesn't fit the architecture.
    """
    if evidence.architecture.digest != architecture.digest:
        raise BundleError("evidence belongs to another architecture")

    def part(name: str) -> npt.NDArray[np.float64]:
        return np.abs(evidence.gradient[name]).astype(np.float64)

    return channel_sums(architecture, part, tuple(k for k in TensorKind if k.is_trainable))


def channel_sums(
    architecture: Architecture, quantity: Callable[[str], npt.NDArray[np.float64]], kinds: Sequence[TensorKind]
) -> Scores:
    """Sums of a quantity per coordinate over the coordinates that make each channel, in tensors of these kinds.
    `quantity` returns an array of a tensor's shape by the tensor's name."""
    sums = tuple(np.zeros(n) for n in architecture.sizes)
    for spec in architecture.tensors:
        axes = [a for a in architecture.output_axes(spec.name) if spec.axes[a].groups]
        if spec.kind not in kinds or not axes:
            continue
        values = quantity(spec.name)
        for axis in axes:
            add_to_channels(sums, spec.axes[axis], values.sum(axis=tuple(i for i in range(values.ndim) if i != axis)))
    return sums


def rank_channels(scores: Sequence[npt.NDArray[Any]]) -> Ranks:
    """Per group its channels by descending score; equal scores by ascending channel. Raises `BundleError` if a score is
    not a number."""
    if any(np.isnan(s).any() for s in scores):
        raise BundleError("channel scores", expected="numbers", got="NaN")
    # Stable, so that equal scores keep the channels' own order on every machine.
    return tuple(np.argsort(-np.asarray(s), kind="stable").astype(np.int64) for s in scores)


def random_ranks(architecture: Architecture, seed: int, round: int) -> Ranks:  # noqa: A002 - the project's word
    """A random permutation per group, the same for all devices of a round: CA-HFP's warm-up masks (Sec. III-A)."""
    return tuple(
        keyed_generator(seed, round, "ranks", g).permutation(n).astype(np.int64)
        for g, n in enumerate(architecture.sizes)
    )


def _checked_tensor(
    architecture: Architecture, tensors: Mapping[str, npt.NDArray[np.float32]], name: str
) -> npt.NDArray[np.float64]:
    value = tensors.get(name)
    shape = architecture.by_name[name].shape
    if value is None or value.shape != shape:
        raise BundleError(
            f"tensor {name} of the scored model", expected=shape, got="nothing" if value is None else value.shape
        )
    # In float64, so that sums over thousands of weights keep their digits.
    return value.astype(np.float64)
