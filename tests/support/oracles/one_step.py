"""One optimiser step of a whole network: what goes in, torch's result, and how far two results are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedprune.model import step_contract
from fedprune.model.architecture import Architecture
from fedprune_export.pruning.model import Model

Arrays = dict[str, np.ndarray[Any, Any]]
NETS = ("lenet", "vgg11_bn", "resnet20_bn")
LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-3

FLIPPED = 1e-4  # from this relative distance of the gradient on, a sign has flipped


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape)


def blocks(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A flat patch on a zero background: nearly every pooling window has several maxima."""
    x = np.zeros(shape)
    for image in x:
        top, left = rng.integers(2, shape[2] // 2, 2)
        image[:, top : top + shape[2] // 3, left : left + shape[3] // 3] = rng.integers(1, 256) / 255
    return x


def photographs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Smooth patches with grain, in 256 steps."""
    coarse = rng.integers(0, 256, (*shape[:2], shape[2] // 4, shape[3] // 4)).repeat(4, 2).repeat(4, 3)
    return (coarse + rng.integers(-8, 9, shape)).clip(0, 255) / 255


KINDS = (normal, blocks, photographs)


def batch(kind: Any, seed: int, architecture: Architecture) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Three or five samples and their labels."""
    rng = np.random.default_rng([seed, len(kind.__name__)])
    size = 5 if seed % 4 else 3
    x = kind(rng, (size, *architecture.input_shape)).astype(np.float32)
    return x, rng.integers(0, architecture.classes, size)


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
