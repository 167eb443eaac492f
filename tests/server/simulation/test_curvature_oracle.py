"""The curvature that CA-HFP's server estimates, beside the Hessian's diagonal that torch computes.

A small network learns digits in federated rounds, whose updates are all that the estimates see.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.func import functional_call, grad, jacrev

from fedprune.aggregation.fold import Fold
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, LayerRow, Segment, TensorKind, TensorSpec
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.importance.gradient_stats import Evidence
from fedprune.strategies.importance.scoring import curvature_scores
from fedprune_server.simulation.digits import load_digits

DEVICES, HIDDEN, ROUNDS, BATCH, LR, MOMENTUM = 8, 16, 20, 16, 0.1, 0.9
CHANNELS = Axis((Segment(0, 0, HIDDEN),))
NET = Architecture(
    "digits-mlp",
    (ChannelGroup("hidden", HIDDEN),),
    (
        TensorSpec("0.weight", TensorKind.WEIGHT, (CHANNELS, Axis.fixed(64))),
        TensorSpec("0.bias", TensorKind.BIAS, (CHANNELS,)),
        TensorSpec("2.weight", TensorKind.WEIGHT, (Axis.fixed(10), CHANNELS)),
        TensorSpec("2.bias", TensorKind.BIAS, (Axis.fixed(10),)),
    ),
    (LayerRow("0", "Gemm", "0.weight", 1), LayerRow("2", "Gemm", "2.weight", 1)),
    (),
    (64,),
    (10,),
)


class Trained(NamedTuple):
    model: Tensors
    evidence: Evidence
    hessian: Tensors


@cache
def train_reference() -> Trained:
    """Twenty rounds of one epoch on eight devices, and the Hessian's diagonal of the loss on all their samples."""
    torch.manual_seed(0)
    x, y = (torch.from_numpy(v) for v in load_digits())
    x = x.reshape(-1, 64)
    shares = torch.randperm(len(x)).tensor_split(DEVICES)
    net, loss = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)), nn.CrossEntropyLoss()
    model = arrays(net.state_dict())
    evidence, full_selection = Evidence.empty(NET), Selection.full(NET)
    for _ in range(ROUNDS):
        fold = Fold(NET, model, evidence=True, momentum=MOMENTUM)
        for share in shares:
            net.load_state_dict({n: torch.from_numpy(v) for n, v in model.items()})
            sgd = torch.optim.SGD(net.parameters(), LR, MOMENTUM)
            batches = share[torch.randperm(len(share))].split(BATCH)
            for batch in batches:
                sgd.zero_grad()
                loss(net(x[batch]), y[batch]).backward()
                sgd.step()
            fold.add(full_selection, arrays(net.state_dict()), len(share), len(batches))
        evidence.update(fold, LR, BATCH)
        model = fold.close()[0]
    return Trained(model, evidence, hessian_diagonal(net, model, x, y))


def hessian_diagonal(net: nn.Module, model: Tensors, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    out: Tensors = {}
    for name, value in model.items():
        rest = {n: torch.from_numpy(v) for n, v in model.items() if n != name}

        def loss(v: torch.Tensor, name: str = name, rest: Any = rest) -> torch.Tensor:
            return nn.functional.cross_entropy(functional_call(net, {**rest, name: v}, (x,)), y)

        hessian = jacrev(grad(loss), chunk_size=64)(torch.from_numpy(value)).reshape(value.size, value.size)
        out[name] = hessian.diagonal().reshape(value.shape).numpy().copy()
    return out


def arrays(tensors: dict[str, torch.Tensor]) -> Tensors:
    return {n: v.detach().numpy().copy() for n, v in tensors.items()}


def second_order(model: Tensors, curves: Tensors) -> Any:
    """Channels' sums of h·w²: the score to the letter of an estimate without gradients."""
    flat = {n: np.zeros_like(v) for n, v in curves.items()}
    return curvature_scores(NET, model, Evidence(NET, gradient=flat, curvature=curves), "signed")[0]


def test_estimated_curvature_is_of_the_hessians_size_and_order() -> None:
    model, evidence, hessian = train_reference()
    for name in ("0.weight", "2.weight"):
        estimate, exact = evidence.curvature[name], hessian[name]
        assert spearmanr(estimate.ravel(), exact.ravel()).statistic > 0.75
        assert 1 / 3 < estimate.sum() / exact.sum() < 3
    ours, theirs = (second_order(model, h) for h in (evidence.curvature, hessian))
    assert spearmanr(ours, theirs).statistic > 0.8


def test_curvature_carries_at_least_half_of_the_variance_of_scores() -> None:
    model, evidence, _ = train_reference()
    scores, second_order_part = curvature_scores(NET, model, evidence)[0], second_order(model, evidence.curvature) / 2
    share = np.cov(second_order_part, scores)[0, 1] / scores.var(ddof=1)
    assert 0.5 < share <= 1
