"""Tells a wrong kernel from rounding: tolerances that come from runs on the processor.

The truth is the same training in float64. Its distance from trainings in float32 on the processor (torch's, ours, and
ours from weights that are one unit in the last place away) is what rounding does to this net, with these samples, up to
this step. A GPU rounds elsewhere in the same way, so it may be `SLACK` times as far away. Two quantities are judged:

- the first step's gradients, tensor by tensor, because no dynamics has amplified their errors yet;
- the losses of the first steps, of which the last are replays of recorded ones. A training amplifies rounding step by
  step; steps whose tolerance is more than a share of what the loss moves at all would pass anything and aren't judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.measured_steps import DECAY, session_step, step_feeds, torch_step
from benchmarks.step_nets import loss, network
from fedprune.model import step_contract
from fedprune.runtime.session import OnnxSession

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

LR = 1e-3  # at 0.01 some nets amplify rounding a hundredfold within ten steps
STEPS = 10  # the first replay is the seventh step: three of each of two places of the state come before it
SLACK = 8.0

# A ReLU or a pooling on an edge falls the other way by rounding. This moved a tensor's gradient by up to 2 % in
# trainings on processors, and needn't happen in those that a tolerance comes from.
GRADIENT_FLOOR = 0.05
MOVEMENT_FLOOR = 0.01  # the same for losses after the first step, as a share of the loss's movement

MAX_TOLERANCE = 0.25  # share of the loss's movement from which on a step isn't judged
MIN_JUDGED = 8  # steps; fewer don't reach two replays

UNIT = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Trace:
    """A training's beginning: the losses of its steps, and the first step's gradients with weight decay."""

    losses: Array
    gradients: Tensors


def torch_trace(name: str, tensors: Tensors, x: Array, y: Array, device: str = "cpu", *, exact: bool = False) -> Trace:
    """Eager torch, in float64 if `exact`."""
    if exact:
        tensors, x = {n: v.astype(np.float64) for n, v in tensors.items()}, x.astype(np.float64)
    net = network(name)
    net.train()
    net.take({n: torch.tensor(v, device=device) for n, v in tensors.items()})
    net.to(device)
    loss(net, torch.tensor(x, device=device), torch.tensor(y, device=device)).backward()
    gradients = {n: (p.grad + DECAY * p.detach()).cpu().numpy() for n, p in net.named_parameters()}
    run = torch_step(name, tensors, x, y, torch.get_num_threads(), device, lr=LR)
    return Trace(np.array([run() for _ in range(STEPS)]), gradients)


def session_trace(session: OnnxSession, tensors: Tensors, x: Array, y: Array) -> Trace:
    """A training graph. The momentum after the first step is the gradient."""
    feeds = step_feeds(session.inputs, tensors, x, y) | {step_contract.LR: np.array(LR, np.float32)}
    outputs = {n: step_contract.next_name(step_contract.momentum_name(n)) for n in tensors}
    outputs = {n: output for n, output in outputs.items() if output in session.outputs}
    values = session.run(feeds, list(outputs.values()))
    gradients = {n: np.array(values[output]) for n, output in outputs.items()}
    run = session_step(session, feeds)
    return Trace(np.array([run() for _ in range(STEPS)]), gradients)


def nudge(tensors: Tensors, seed: int) -> dict[str, Array]:
    """The weights, each one unit in the last place away."""
    rng = np.random.default_rng(seed)
    return {n: np.nextafter(v, np.where(rng.random(v.shape) < 0.5, -np.inf, np.inf)) for n, v in tensors.items()}


def processor_traces(name: str, session: OnnxSession, tensors: Tensors, x: Array, y: Array) -> list[Trace]:
    """Trainings in float32 on the processor; `session` has the training graph there."""
    nudged = {n: v.astype(np.float32) for n, v in nudge(tensors, 0).items()}
    starts = (tensors, nudged)
    return [torch_trace(name, tensors, x, y), *(session_trace(session, start, x, y) for start in starts)]


def judge(trace: Trace, exact: Trace, rounded: Sequence[Trace]) -> dict[str, Any]:
    """The verdict on a training.

    Returns:
        `ok`; `judged`, the number of steps whose losses were judged; for losses and gradients the largest distance as a
        share of its tolerance (`loss`, `gradient`), with its `step`, from 1, and its `tensor`; `away`, the largest
        distance of a judged loss.
    """
    movement = float(np.ptp(exact.losses))
    distances = np.abs(trace.losses - exact.losses)
    spread = np.maximum.accumulate(np.max([np.abs(r.losses - exact.losses) for r in rounded], axis=0))
    tolerances = SLACK * np.maximum(spread, UNIT * np.abs(exact.losses))
    tolerances[1:] = np.maximum(tolerances[1:], MOVEMENT_FLOOR * movement)
    judged = int(np.cumprod(tolerances <= MAX_TOLERANCE * movement).sum())
    shares = _or_infinity(distances / tolerances)[: max(1, judged)]
    gradients = {n: _gradient_share(n, trace, exact, rounded) for n in exact.gradients}
    tensor = max(gradients, key=gradients.__getitem__)
    return {
        "ok": bool(shares.max() <= 1 and gradients[tensor] <= 1 and judged >= MIN_JUDGED),
        "judged": judged,
        "loss": float(shares.max()),
        "step": 1 + int(shares.argmax()),
        "gradient": gradients[tensor],
        "tensor": tensor,
        "away": float(distances[: max(1, judged)].max()),
    }


def _gradient_share(name: str, trace: Trace, exact: Trace, rounded: Sequence[Trace]) -> float:
    """A gradient's distance from the exact one, as a share of its tolerance."""
    truth = exact.gradients[name]

    def distance(other: Trace) -> float:
        return float(np.linalg.norm(other.gradients[name] - truth))

    rounding = max(map(distance, rounded))
    tolerance = max(SLACK * rounding, GRADIENT_FLOOR * float(np.linalg.norm(truth)), UNIT * truth.size**0.5)
    return float(_or_infinity(np.array(distance(trace) / tolerance)))


def _or_infinity(values: Array) -> Array:
    return np.where(np.isfinite(values), values, np.inf)
