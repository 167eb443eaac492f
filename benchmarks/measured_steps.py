"""A training step of ours and of eager torch, as `step.py` times them and `arm` counts their instructions.

Each imports its own engine alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LR, MOMENTUM, DECAY = 0.01, 0.9, 1e-4

Step = Callable[[], float]


def our_step(graph: Path, tensors: Mapping[str, Any], x: Any, y: Any, threads: int) -> Step:
    """The training graph that serves every width, fed as a board's trainer feeds it."""
    from fedprune.model import step_contract
    from fedprune.runtime.session import Session

    session = Session(graph, threads=threads, training=True)
    scalars = {step_contract.LR: LR, step_contract.MOMENTUM: MOMENTUM, step_contract.WEIGHT_DECAY: DECAY}
    feeds: dict[str, Any] = {**{n: v.copy() for n, v in tensors.items()}, step_contract.X: x, step_contract.Y: y}
    feeds |= {n: np.array(v, np.float32) for n, v in scalars.items()}
    feeds |= {n: np.zeros_like(tensors[n.split("::")[0]]) for n in session.inputs if "::" in n}

    moving = [n for n in feeds if step_contract.following(n) in session.outputs]
    spare = {n: np.empty_like(feeds[n]) for n in moving}

    def run() -> float:
        out = session.run(feeds, into={step_contract.following(n): spare[n] for n in moving})
        for name in moving:  # as the board's trainer has it
            feeds[name], spare[name] = spare[name], feeds[name]
        return float(out[step_contract.LOSS])

    return run


def torch_step(name: str, tensors: Mapping[str, Any], x: Any, y: Any, threads: int) -> Step:
    """Eager torch; the module takes the width of the tensors that are put in."""
    import torch
    from step_nets import loss, network

    torch.set_num_threads(threads)
    net = network(name)
    net.train()
    net.take({n: torch.tensor(v) for n, v in tensors.items()})
    optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM, weight_decay=DECAY)
    images, labels = torch.tensor(x), torch.tensor(y)

    def run() -> float:
        optimizer.zero_grad()
        value = loss(net, images, labels)
        value.backward()
        optimizer.step()
        return float(value.detach())

    return run
