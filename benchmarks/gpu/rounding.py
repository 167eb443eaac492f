"""Tells a wrong kernel from rounding: tolerances that come from runs on the processor.

The truth is the same in float64. Its distance from runs in float32 on the processor (torch's, ours, and ours from
weights that are one unit in the last place away) is what rounding does to this net with these samples. A GPU rounds
elsewhere in the same way, so it may be `SLACK` times as far away. Two trainings are judged:

- one that stands still: at a learning rate of 0, on samples and labels in another order in each step. No step amplifies
  the rounding of the one before, so that losses must be right, and so must the state at the end: momentum, which sums
  up the gradients of all steps, and the statistics of batch norms. The last steps are replays of recorded ones: one
  that read earlier samples, labels or state would be far away.
- one that moves, at a small rate. A training amplifies rounding from step to step, in some nets a hundredfold within
  ten; steps whose tolerance is a large share of what they move the loss would pass anything and aren't judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.measured_steps import DECAY, MOMENTUM, session_step, step_feeds, torch_step
from benchmarks.step_nets import loss, network
from fedprune.model import step_contract
from fedprune.runtime.session import OnnxSession

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

LR = 1e-3  # of the training that moves; at 0.01 some nets leave no step to judge
MOVING_STEPS = 5
STILL_STEPS = 10  # the first replay is the seventh: three runs for each of two places of the state come before it
LABEL_ROLL = 3  # labels move on by another number than samples
SLACK = 8.0

# A ReLU or a pooling on an edge falls the other way by rounding. On processors this moved a tensor's gradient by up to
# 2 %, and it needn't happen in those runs that a tolerance comes from.
GRADIENT_FLOOR = 0.05
# The same for the rows of an output, as shares of their root mean square: the median row was up to 0.5 % away, the
# farthest 2 %. They tell a tensor that is all a little off, and a row that is missing, from such falls.
MEDIAN_ROW_FLOOR = 0.01
ROW_FLOOR = 0.2
MOVEMENT_FLOOR = 0.01  # the same for losses after the first update, as a share of the loss's movement

MAX_TOLERANCE = 0.25  # share of what a step moves the loss, from which on moving steps aren't judged
MIN_JUDGED = 2  # moving steps: the second shows whether the first one's update was right

UNIT = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Trace:
    """The losses of a training that stands still and of one that moves, and momentum and statistics at the end of the
    first, by the names of their tensors."""

    still: Array
    state: Tensors
    moving: Array


def torch_trace(name: str, tensors: Tensors, x: Array, y: Array, device: str = "cpu", *, exact: bool = False) -> Trace:
    """Eager torch, in float64 if `exact`."""
    if exact:
        tensors, x = {n: v.astype(np.float64) for n, v in tensors.items()}, x.astype(np.float64)
    net = network(name)
    net.train()
    net.take({n: torch.tensor(v, device=device) for n, v in tensors.items()})
    net.to(device)
    momentum = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    samples, labels, still = torch.tensor(x, device=device), torch.tensor(y, device=device), []
    for number in range(STILL_STEPS):
        net.zero_grad()
        value = loss(net, samples.roll(number, 0), labels.roll(LABEL_ROLL * number, 0))
        value.backward()
        still.append(float(value.detach()))
        for n, p in net.named_parameters():
            if p.grad is not None:
                momentum[n] = MOMENTUM * momentum[n] + p.grad + DECAY * p.detach()
    run = torch_step(name, tensors, x, y, torch.get_num_threads(), device, lr=LR)
    moving = np.array([run() for _ in range(MOVING_STEPS)])
    state = momentum | {n: v for n, v in net.named_buffers() if n in tensors}
    return Trace(np.array(still), {n: v.cpu().numpy() for n, v in state.items()}, moving)


def session_trace(session: OnnxSession, tensors: Tensors, x: Array, y: Array) -> Trace:
    """A training graph, as a board's trainer runs it."""
    samples, labels, fed = x.copy(), y.copy(), dict[str, Any]()
    feeds = step_feeds(session.inputs, tensors, samples, labels) | {step_contract.LR: np.array(0, np.float32)}
    run, still = session_step(session, feeds, fed), []
    for number in range(STILL_STEPS):
        samples[...], labels[...] = np.roll(x, number, 0), np.roll(y, LABEL_ROLL * number, 0)
        still.append(run())
    # Weights have a momentum; what has none are statistics.
    state = {n: np.array(fed[name if (name := step_contract.momentum_name(n)) in fed else n]) for n in tensors}
    feeds = step_feeds(session.inputs, tensors, x, y) | {step_contract.LR: np.array(LR, np.float32)}
    run = session_step(session, feeds)
    return Trace(np.array(still), state, np.array([run() for _ in range(MOVING_STEPS)]))


def nudge(tensors: Tensors, seed: int) -> dict[str, Array]:
    """The weights, each one unit in the last place away."""
    rng, infinity = np.random.default_rng(seed), np.float32(np.inf)
    return {n: np.nextafter(v, np.where(rng.random(v.shape) < 0.5, -infinity, infinity)) for n, v in tensors.items()}


def processor_traces(name: str, session: OnnxSession, tensors: Tensors, x: Array, y: Array) -> list[Trace]:
    """Trainings in float32 on the processor; `session` has the training graph there."""
    starts = (tensors, nudge(tensors, 0))
    return [torch_trace(name, tensors, x, y), *(session_trace(session, start, x, y) for start in starts)]


def judge(trace: Trace, exact: Trace, rounded: Sequence[Trace]) -> dict[str, Any]:
    """The verdict on a training.

    Returns:
        `ok`; distances as shares of their tolerances: the largest of losses that stand still (`still`), of a tensor's
        state (`state`, `tensor`) and of judged losses that move (`moving`); `judged`, the number of these;
        `away`, the largest distance of a loss that stands still or of a judged one.
    """
    unit = UNIT * np.abs(exact.still)
    away = np.abs(trace.still - exact.still)
    still = away / (SLACK * np.maximum(_spread([r.still for r in rounded], exact.still), unit))

    movement = float(np.ptp(exact.moving))
    distances = np.abs(trace.moving - exact.moving)
    tolerances = SLACK * np.maximum(_spread([r.moving for r in rounded], exact.moving), UNIT * np.abs(exact.moving))
    tolerances[1:] = np.maximum(tolerances[1:], MOVEMENT_FLOOR * movement)
    steps = np.abs(np.diff(exact.moving, prepend=exact.moving[0] + movement))
    judged = int(np.cumprod(tolerances <= MAX_TOLERANCE * steps).sum())
    moving = (distances / tolerances)[:judged]

    state = {n: _state_share(n, trace, exact, rounded) for n in exact.state}
    tensor = max(state, key=lambda n: _or_infinity(state[n]))
    shares = {
        "still": _or_infinity(still.max()),
        "state": _or_infinity(state[tensor]),
        "moving": _or_infinity(moving.max(initial=0.0)),
    }
    ok = max(shares.values()) <= 1 and judged >= MIN_JUDGED
    largest = max(away.max(), distances[:judged].max(initial=0.0))
    return {"ok": ok, "judged": judged, "tensor": tensor, **shares, "away": _or_infinity(largest)}


def _spread(losses: Sequence[Array], truth: Array) -> Array:
    """The largest distance from the truth up to each step."""
    return np.maximum.accumulate(np.max([np.abs(values - truth) for values in losses], axis=0))


def _state_share(name: str, trace: Trace, exact: Trace, rounded: Sequence[Trace]) -> float:
    """A tensor's distance from the exact one, as a share of its tolerance: of the whole, of its median row or of the
    farthest row, whichever is largest."""
    norms = _row_norms(exact.state[name])
    scale = max(float(np.sqrt(np.mean(norms**2))), UNIT)

    def distances(other: Trace) -> Array:
        """As shares of the rows' root mean square: whole tensor, median row, farthest row (or its own share)."""
        rows = _row_norms(other.state[name] - exact.state[name])
        farthest = (rows / np.maximum(norms, scale)).max()
        return np.array([np.sqrt(np.mean(rows**2)) / scale, np.median(rows) / scale, farthest])

    rounding = SLACK * np.max([distances(other) for other in rounded], axis=0)
    floors = [GRADIENT_FLOOR, MEDIAN_ROW_FLOOR, ROW_FLOOR]
    return float((distances(trace) / np.maximum(rounding, floors)).max())


def _row_norms(tensor: Array) -> Array:
    return np.linalg.norm(tensor.reshape(len(tensor), -1), axis=1)


def _or_infinity(value: float) -> float:
    return float(value) if np.isfinite(value) else float("inf")
