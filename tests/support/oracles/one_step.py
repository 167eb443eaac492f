"""One optimiser step of a whole network: what goes in, torch's result, and how far two results are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedprune.model import step_contract
from fedprune.model.architecture import Architecture
from fedprune_export.pruning.model import Model

Arrays = dict[str, np.ndarray[Any, Any]]
LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-3


def feeds(architecture: Architecture, tensors: Arrays, x: Any, y: Any) -> Arrays:
    """What the training graph is fed in the first step."""
    out: Arrays = {**tensors, step_contract.X: x, step_contract.Y: y}
    out |= {step_contract.buffer(t.name): np.zeros_like(tensors[t.name]) for t in architecture.trainable}
    for scalar, value in (
        (step_contract.LR, LR),
        (step_contract.MOMENTUM, MOMENTUM),
        (step_contract.WEIGHT_DECAY, DECAY),
    ):
        out[scalar] = np.array(value, np.float32)
    return out


def parts(architecture: Architecture) -> dict[str, list[str]]:
    """The step's results: groups of tensors that are compared as one vector."""
    out = {
        "loss": [step_contract.LOSS],
        "gradients": [step_contract.gradient(t.name) for t in architecture.trainable],
        "weights": [step_contract.following(t.name) for t in architecture.trainable],
    }
    if architecture.statistics:
        out["statistics"] = [step_contract.following(t.name) for t in architecture.statistics]
    return out


def oracle(net: torch.nn.Module, model: Model, tensors: Arrays, x: Any, y: Any, dtype: torch.dtype) -> Arrays:
    """The first step of torch.optim.SGD from these tensors, of any width."""
    state = {n: torch.tensor(v, dtype=dtype) for n, v in tensors.items()}
    leaves = {t.name: state[t.name].requires_grad_() for t in model.architecture.trainable}
    optimizer = torch.optim.SGD(list(leaves.values()), LR, MOMENTUM, weight_decay=DECAY)
    given = torch.tensor(x, dtype=dtype if x.dtype.kind == "f" else None)
    logits = torch.func.functional_call(net, state, given)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(y))
    loss.backward()
    gradients = {step_contract.gradient(n): w.grad.numpy().copy() for n, w in leaves.items() if w.grad is not None}
    optimizer.step()
    return {
        step_contract.LOSS: loss.detach().numpy(),
        **gradients,
        **{step_contract.following(n): v.detach().numpy() for n, v in state.items()},
    }


def distances(got: Arrays, exact: Arrays, parts: dict[str, list[str]]) -> dict[str, float]:
    """Relative L2 distance of each part (all its tensors as one vector)."""
    out = {}
    for part, names in parts.items():
        off = sum(float(np.sum((got[n].astype(np.float64) - exact[n]) ** 2)) for n in names)
        size = sum(float(np.sum(exact[n].astype(np.float64) ** 2)) for n in names)
        out[part] = float(np.sqrt(off / size))
    return out
