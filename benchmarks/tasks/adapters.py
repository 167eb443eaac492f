"""A language model that was trained on plays, and is frozen, with adapters as PEFT has them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.tasks import data
from benchmarks.tasks.nets import Characters

RANK = 16

_EPOCHS, _RATE, _BATCH = 5, 2e-3, 32


class Low(nn.Module):
    """A frozen linear layer and an adapter beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Speaker(nn.Module):
    """The trained base with adapters of rank 16 beside all linear layers of its blocks."""

    input_shape, input_dtype = Characters.input_shape, Characters.input_dtype

    def __init__(self) -> None:
        super().__init__()
        self.base = trained_base().requires_grad_(False)
        for block in self.base.blocks:
            for owner, name in ((block, "qkv"), (block, "out"), (block.mlp, "0"), (block.mlp, "2")):
                setattr(owner, name, Low(getattr(owner, name)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


def trained_base() -> Characters:
    """The base, trained on what all roles of the plays say; its weights are kept for later runs."""
    place = Path("build/tasks/base.pt")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Characters()
        if place.exists():
            net.load_state_dict(torch.load(place, weights_only=True))
            return net
        rows = torch.tensor(data.all_plays())
        optimizer = torch.optim.Adam(net.parameters(), lr=_RATE)
        steps = _EPOCHS * -(-len(rows) // _BATCH)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(_EPOCHS):
            for some in torch.randperm(len(rows)).split(_BATCH):
                optimizer.zero_grad()
                functional.cross_entropy(net(rows[some, :-1]), rows[some, 1:]).backward()
                optimizer.step()
                falling.step()
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), place)
        return net
