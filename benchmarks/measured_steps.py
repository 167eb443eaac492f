"""A training step of ours and of eager torch, as `step.py` times them and `arm` counts their instructions.

Each imports its own engine alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LR, MOMENTUM, DECAY = 0.01, 0.9, 1e-4
BATCH = 32

Step = Callable[[], float]


def batch(shape: tuple[int, ...], size: int = BATCH) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Random samples and labels of ten classes."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((size, *shape)).astype(np.float32), rng.integers(0, 10, size)


def step_feeds(inputs: Iterable[str], tensors: Mapping[str, Any], x: Any, y: Any) -> dict[str, Any]:
    """The feeds of a training graph's first step."""
    from fedprune.model import step_contract

    scalars = {step_contract.LR: LR, step_contract.MOMENTUM: MOMENTUM, step_contract.WEIGHT_DECAY: DECAY}
    feeds: dict[str, Any] = {**{n: v.copy() for n, v in tensors.items()}, step_contract.X: x, step_contract.Y: y}
    feeds |= {n: np.array(v, np.float32) for n, v in scalars.items()}
    state = (n for n in inputs if "::" in n and not step_contract.is_random_input(n))
    return feeds | {n: np.zeros_like(tensors[n.split("::")[0]]) for n in state}


def session_step(session: Any, feeds: Mapping[str, Any], fed: dict[str, Any] | None = None) -> Step:
    """Steps of a session (`fedprune.runtime.session`) that is fed as a board's trainer feeds it.

    `fed` is filled with the feeds of the next step: weights and state change from step to step.
    """
    from fedprune.model import step_contract

    moving = [n for n in feeds if step_contract.next_name(n) in session.outputs]
    fed = {} if fed is None else fed
    fed.update({**feeds, **session.place({n: feeds[n] for n in moving}, "state")})
    spare = session.place({n: np.empty_like(feeds[n]) for n in moving}, "next state")

    def run() -> float:
        out = session.run(fed, into={step_contract.next_name(n): spare[n] for n in moving})
        for name in moving:  # on a GPU that failed they are not in the place that was meant for them
            spare[name], fed[name] = fed[name], out[step_contract.next_name(name)]
        return float(out[step_contract.LOSS])

    return run


def our_step(graph: Path, tensors: Mapping[str, Any], x: Any, y: Any, threads: int) -> Step:
    """The training graph that serves every width; its random inputs are at their means."""
    from fedprune.model.random_inputs import RandomInputs
    from fedprune.runtime.session import OnnxSession

    session = OnnxSession(graph, threads=threads, training=True)
    feeds = step_feeds(session.inputs, tensors, x, y)
    return session_step(session, feeds | RandomInputs.of(session.inputs, session.metadata).means(feeds, len(x)))


def our_draws(graph: Path, tensors: Mapping[str, Any], x: Any) -> Step:
    """What a step with dropout does besides running its graph: its random inputs are drawn."""
    from fedprune.model.random_inputs import RandomInputs
    from fedprune.runtime.session import OnnxSession

    session = OnnxSession(graph, threads=1, training=True)
    random = RandomInputs.of(session.inputs, session.metadata)
    return lambda: float(len(random.draw(tensors, len(x), 0, 1, "board", "dropout", 1)))


def torch_step(
    name: str, tensors: Mapping[str, Any], x: Any, y: Any, threads: int, device: str = "cpu", lr: float = LR
) -> Step:
    """Eager torch on one of its devices; the module takes the width of the tensors that are put in."""
    import torch

    from benchmarks.step_nets import loss, network

    torch.set_num_threads(threads)
    net = network(name)
    net.train()
    net.take({n: torch.tensor(v, device=device) for n, v in tensors.items()})
    net.to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr, MOMENTUM, weight_decay=DECAY)
    images, labels = torch.tensor(x, device=device), torch.tensor(y, device=device)

    def run() -> float:
        optimizer.zero_grad()
        value = loss(net, images, labels)
        value.backward()
        optimizer.step()
        return float(value.detach())

    return run
