"""Transport where layers add to one stream: what comes after the sum goes by the average of the layers' plans."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from fedprune.model.architecture import Architecture
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.optimal_transport import align
from fedprune.strategies.optimal_transport.layer_order import layer_steps
from fedprune.strategies.optimal_transport.residual_sums import after_sums
from fedprune_export.importing import export_torch, import_onnx
from support.nets import whole_models
from support.oracles.pot_plans import pot

pytestmark = pytest.mark.torch
pytest.importorskip("ot")

Floats = npt.NDArray[Any]


class PreActivation(nn.Module):
    """A pre-activation residual block, and a depthwise layer with a bias behind its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(6)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.bn4 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))
        x = torch.relu(self.bn4(self.depth(torch.relu(self.bn3(x)))))
        out: torch.Tensor = self.fc(x.mean((2, 3)))
        return out


class Words(nn.Module):
    """A table of words, to whose rows a pre-norm block with a MatMul and a bias adds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.norm1 = nn.LayerNorm(6)
        self.up = nn.Linear(6, 4)
        self.down = nn.Linear(4, 6)
        self.norm2 = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.table(x)
        x = x + self.down(torch.relu(self.up(self.norm1(x))))
        out: torch.Tensor = self.fc(self.norm2(x).mean(1))
        return out


def numbers(architecture: Architecture, seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    return {t.name: np.abs(rng.standard_normal(t.shape)).astype(np.float32) for t in architecture.tensors}


def follow_plan(value: Floats, plan: Floats) -> Floats:
    """W·T along the input axis."""
    return np.moveaxis(np.tensordot(value.astype(np.float64), plan, (1, 0)), -1, 1)


def plan_of(a: Floats, b: Floats) -> Floats:
    a, b = (v.reshape(len(v), -1).astype(np.float64) for v in (a, b))
    plan = pot(np.sqrt(((a[:, None] - b) ** 2).sum(2)))
    return np.asarray(plan / plan.sum(0))


def check(got: Tensors, source: Tensors, plans: dict[str, Floats]) -> None:
    """Every tensor but the named layers' weights is Tᵀ·v by the map that is said of its module."""
    for name, value in got.items():
        plan = plans.get(name, plans.get(name.rpartition(".")[0]))
        if plan is not None:
            want = np.tensordot(plan.T, source[name].astype(np.float64), 1)
            np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("back", [False, True], ids=["OTP", "OTA"])
def test_a_norm_after_a_sum_goes_by_the_average(back: bool) -> None:
    net = import_onnx(export_torch(PreActivation(), input_shape=(3, 8, 8)), "pre").architecture
    full, small = Selection.full(net), Selection.of(net, [n // 2 for n in net.sizes])
    ends = [(numbers(net, 0), full), (small.gather(numbers(net, 1)), small)]
    (source, source_at), (target, target_at) = ends[::-1] if back else ends
    got = align(source, source_at, target, target_at)
    stem = plan_of(source["stem.weight"], target["stem.weight"])
    inner = plan_of(follow_plan(source["conv1.weight"], stem), target["conv1.weight"])
    branch = plan_of(follow_plan(source["conv2.weight"], inner), target["conv2.weight"])
    stream = (stem + branch) / 2
    assert np.abs(stream - branch).max() > 0.1
    after = {"bn3": stream, "depth": stream, "bn4": stream}
    check(got, source, {"stem": stem, "bn1": stem, "bn2": inner, "conv2.bias": branch, **after})
    np.testing.assert_allclose(got["fc.weight"], follow_plan(source["fc.weight"], stream), rtol=1e-4, atol=1e-5)


def test_a_table_goes_by_its_own_plan_and_the_last_norm_by_the_average() -> None:
    net = import_onnx(export_torch((Words(), torch.zeros(2, 7, dtype=torch.int64))), "words").architecture
    small = Selection.of(net, [n // 2 for n in net.sizes])
    source, target = numbers(net, 0), small.gather(numbers(net, 1))
    got = align(source, Selection.full(net), target, small)
    table = plan_of(source["table.weight"].T, target["table.weight"].T)
    up = plan_of(follow_plan(source["up.weight"], table), target["up.weight"])
    down = plan_of(follow_plan(source["down.weight"], up), target["down.weight"])
    check(got, source, {"norm1": table, "up.bias": up, "down.bias": down, "norm2": (table + down) / 2})
    np.testing.assert_allclose(got["table.weight"], source["table.weight"] @ table, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"), [("padded_shortcuts", set()), ("tied_language_model", {"norm2", "norm"})]
)
def test_what_follows_a_sum_is_found_in_the_table_of_layers(name: str, expected: set[str]) -> None:
    net = whole_models.whole_model(name).architecture
    after = [n for names in after_sums(net, layer_steps(net)).values() for n in names]
    assert {n.rpartition(".")[0] for n in after} == expected
