"""Optimisers, clipping, pulls, masks and sums of the training graph against torch.optim, on given gradients.

torch has no Lion: its oracle is the paper's algorithm.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedprune_export as fx
from fedprune.model import step_contract
from fedprune.model.features import OPTIMIZERS, Features
from fedprune.model.recipe import Recipe
from fedprune.runtime.session import OnnxSession
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.autodiff.tape import port
from fedprune_export.ir.graph import Graph
from fedprune_export.training.optimizers import TrainedTensor, add_inputs, write_updates
from fedprune_export.training.step_graph import training_graph

pytestmark = pytest.mark.torch

Arrays = dict[str, np.ndarray[Any, Any]]
SHAPES = {"w": (3, 4), "b": (5,), "scale": (), "kernel": (3, 2, 1, 1)}


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, Alg. 2."""

    def __init__(self, leaves: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(leaves, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (first, second), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for leaf in group["params"]:
                mean = self.state[leaf]["exp_avg"]
                leaf -= lr * (torch.lerp(leaf.grad, mean, first).sign() + decay * leaf)
                self.state[leaf]["exp_avg"] = torch.lerp(leaf.grad, mean, second)


class GivenGradients:
    """Stands for a tape whose gradients are inputs of the graph."""

    intends = False

    def gradient(self, name: str) -> str:
        return f"d{name}"


@cache
def session(optimizer: str, **asked: bool) -> OnnxSession:
    features = Features(optimizer=optimizer, **asked)
    g = Graph(name="update")
    trained = [TrainedTensor(n, s) for n, s in SHAPES.items()]
    g.inputs = [port(n, t.shape) for t in trained for n in (t.name, f"d{t.name}")]
    add_inputs(g, trained, features)
    write_updates(g, GivenGradients(), trained, features)  # type: ignore[arg-type]
    return OnnxSession(g.to_bytes(), training=True)


def start(run: OnnxSession) -> Arrays:
    rng = np.random.default_rng(3)
    out = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    for name, (_, shape) in run.inputs.items():
        if "::" in name and not name.endswith(("::mu", "::mask", "::anchor", "::drift")):
            out[name] = np.zeros(shape, np.float32)
    return out


def steps(run: OnnxSession, numbers: Arrays, gradients: list[Arrays]) -> list[Arrays]:
    """Every step's tensors and state."""
    state, states = start(run), []
    for count, gradient in enumerate(gradients, 1):
        fed = {**numbers, **state, **gradient, step_contract.STEP_NUMBER: np.array(count, np.int64)}
        out = run.run({k: v for k, v in fed.items() if k in run.inputs})
        state = {n: out[step_contract.next_name(n)] for n in state}
        states.append(state)
    return states


def gradients(count: int, seed: int, sizes: float) -> list[Arrays]:
    rng = np.random.default_rng(seed)

    def one(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        # Some are so small that Adam's division brings them up to the others.
        return np.asarray(sizes * rng.standard_normal(shape) * rng.choice([1e-4, 1], shape), np.float32)

    return [{f"d{n}": one(s) for n, s in SHAPES.items()} for _ in range(count)]


def scalars(**values: float) -> Arrays:
    return {
        k: np.array(v, np.float64 if k in (step_contract.BETA1, step_contract.BETA2) else np.float32)
        for k, v in values.items()
    }


def oracle(
    optimizer: str, numbers: Arrays, state: Arrays, gradient: Arrays, clip: float, count: int, dtype: torch.dtype
) -> Arrays:
    """One step of torch.optim from these tensors and this state, as its `count`th."""
    leaves = {n: torch.tensor(state[n], dtype=dtype).requires_grad_() for n in SHAPES}
    get = {k: float(v) for k, v in numbers.items()}
    if optimizer == "sgd":
        torch_optimizer: torch.optim.Optimizer = torch.optim.SGD(
            leaves.values(), get["lr"], get["momentum"], weight_decay=get["weight_decay"]
        )
        names = {"momentum_buffer": step_contract.momentum_name}
    elif optimizer == "lion":
        torch_optimizer = Lion(leaves.values(), get["lr"], (get["beta1"], get["beta2"]), get["weight_decay"])
        names = {"exp_avg": step_contract.momentum_name}
    else:
        kind = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
        betas = (get["beta1"], get["beta2"])
        torch_optimizer = kind(leaves.values(), get["lr"], betas, get["epsilon"], get["weight_decay"])
        names = {"exp_avg": step_contract.momentum_name, "exp_avg_sq": step_contract.second_moment_name}
    for name, leaf in leaves.items():
        leaf.grad = torch.tensor(gradient[f"d{name}"], dtype=dtype)
        torch_optimizer.state[leaf] = {
            key: torch.tensor(state[array(name)], dtype=dtype) for key, array in names.items()
        }
        if optimizer in ("adam", "adamw"):
            torch_optimizer.state[leaf]["step"] = torch.tensor(count - 1.0)
    if clip:
        torch.nn.utils.clip_grad_norm_(leaves.values(), clip)
    torch_optimizer.step()
    out = {n: w.detach().numpy() for n, w in leaves.items()}
    if not get.get("momentum", 1):
        return out  # torch keeps no buffer then
    return out | {
        array(n): torch_optimizer.state[w][key].numpy() for n, w in leaves.items() for key, array in names.items()
    }


def error(got: Arrays, want: Arrays) -> float:
    """Relative distance of all tensors as one vector."""
    off = sum(float(np.sum((got[n].astype(np.float64) - want[n]) ** 2)) for n in want)
    return float(np.sqrt(off / max(sum(float(np.sum(want[n] ** 2)) for n in want), 1e-60)))


def beyond_rounding(
    got: Arrays, want: Arrays, before: Arrays, gradient: Arrays, decay: float, clip: float
) -> list[str]:
    """Kinds of arrays that are off by more than a few roundings of the largest terms that they are sums of.

    A strong decay makes weights and momentum differences of much larger terms, whose own rounding stays.
    """

    def size(arrays: Arrays, names: list[str]) -> float:
        return float(np.sqrt(sum(float(np.sum(np.asarray(arrays[n], np.float64) ** 2)) for n in names)))

    tensors = list(SHAPES)
    sums = {
        "tensors": (tensors, size(before, tensors)),
        "means": (
            [step_contract.momentum_name(n) for n in tensors],
            size(before, [step_contract.momentum_name(n) for n in tensors])
            + decay * size(before, tensors)
            + min(clip, size(gradient, [f"d{n}" for n in tensors])),
        ),
        "squares": ([step_contract.second_moment_name(n) for n in tensors], 0.0),
    }
    off = []
    for kind, (names, terms) in sums.items():
        names = [n for n in names if n in want]
        if size({n: got[n].astype(np.float64) - want[n] for n in names}, names) > 4e-7 * (size(want, names) + terms):
            off.append(kind)
    return off


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(max_examples=40, deadline=None)
@given(
    lr=st.floats(2**-13, 0.5, width=32),
    decay=st.sampled_from([0.0, 0.01, 0.5]),
    keep=st.sampled_from([0.0, 0.5, 0.9]),
    keep2=st.sampled_from([0.9, 0.99, 0.999]),
    clip=st.sampled_from([0.01, 1.0, 100.0]),
    size=st.sampled_from([1e-3, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_several_steps_are_those_of_torch(
    optimizer: str, clips: bool, lr: float, decay: float, keep: float, keep2: float, clip: float, size: float, seed: int
) -> None:
    run = session(optimizer, clip=clips)
    numbers = scalars(lr=lr, weight_decay=np.float32(decay), clip_norm=clip)
    numbers |= scalars(momentum=keep) if optimizer == "sgd" else scalars(beta1=keep, beta2=keep2, epsilon=1e-8)
    given_gradients, state = gradients(4, seed, size), start(run)
    for count, (gradient, ours) in enumerate(
        zip(given_gradients, steps(run, numbers, given_gradients), strict=True), 1
    ):
        want = oracle(optimizer, numbers, state, gradient, clip if clips else 0, count, torch.float64)
        assert not beyond_rounding(ours, want, state, gradient, decay, clip if clips else np.inf)
        state = ours


@pytest.mark.parametrize("count", [1, 1000])
def test_bias_correction_keeps_its_digits(count: int) -> None:
    """With equal gradients every step of Adam is lr, whatever the step's number."""
    run = session("adam")
    numbers = scalars(lr=1.0, weight_decay=0, beta1=0.9, beta2=0.999, epsilon=1e-16)
    size = np.float32(0.37)
    state = start(run)
    for name, shape in SHAPES.items():
        # What count − 1 such gradients have left behind.
        state[step_contract.momentum_name(name)] = np.full(shape, size * (1 - 0.9 ** (count - 1)), np.float32)
        state[step_contract.second_moment_name(name)] = np.full(
            shape, float(size) ** 2 * (1 - 0.999 ** (count - 1)), np.float32
        )
        state[name] = np.zeros(shape, np.float32)
    fed = {**numbers, **state, **{f"d{n}": np.full(s, size, np.float32) for n, s in SHAPES.items()}}
    got = run.run({**fed, step_contract.STEP_NUMBER: np.array(count, np.int64)})
    for name in SHAPES:
        np.testing.assert_allclose(got[step_contract.next_name(name)], -1, rtol=4e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pull_and_mask_act_with_every_optimizer(optimizer: str) -> None:
    """A masked element stays, whatever its gradient; the pull's gradient is µ · (w − anchor)."""
    run = session(optimizer, proximal=True, element_mask=True, clip=True, gradients=True)
    rng = np.random.default_rng(8)
    numbers = scalars(lr=0.1, weight_decay=0.3, clip_norm=0.5, momentum=0.9, beta1=0.9, beta2=0.99, epsilon=1e-8)
    state, mu = start(run), {n: np.float32(rng.uniform(0.1, 1)) for n in SHAPES}
    masks = {n: (rng.random(s) < 0.6).astype(np.float32) for n, s in SHAPES.items()}
    masks["scale"] = np.array(1, np.float32)
    anchors = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    extra = {step_contract.mask_name(n): m for n, m in masks.items()} | {
        step_contract.anchor_name(n): a for n, a in anchors.items()
    }
    extra |= {step_contract.strength_name(n): np.array(m) for n, m in mu.items()}
    given_gradients = gradients(1, 5, 1.0)[0]
    fed = {**numbers, **state, **extra, **given_gradients, step_contract.STEP_NUMBER: np.array(1, np.int64)}
    got = run.run({k: v for k, v in fed.items() if k in run.inputs})
    pulled = {
        f"d{n}": ((given_gradients[f"d{n}"] + mu[n] * (state[n] - anchors[n])) * masks[n]).astype(np.float32)
        for n in SHAPES
    }
    want = oracle(optimizer, numbers, state, pulled, 0.5, 1, torch.float64)
    for name in SHAPES:
        np.testing.assert_allclose(got[step_contract.gradient_name(name)], pulled[f"d{name}"], rtol=1e-5, atol=1e-7)
        expected = np.where(masks[name] > 0, want[name], state[name])
        np.testing.assert_allclose(got[step_contract.next_name(name)], expected, rtol=1e-5, atol=1e-6)
        masked = np.broadcast_to(masks[name] == 0, SHAPES[name])
        np.testing.assert_array_equal(got[step_contract.next_name(name)][masked], state[name][masked])


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_drift_is_added_to_clipped_gradients(optimizer: str, masked: bool, decay: float) -> None:
    """By torch.optim on the gradient, clipped, and the drift; masked elements have neither, in weights and state."""
    features = Recipe(optimizer=optimizer, drift=True, weight_decay=decay).features
    run = session(optimizer, drift=True, element_mask=masked, clip=True, decay=features.decay)
    rng, given_gradients = np.random.default_rng(9), gradients(1, 5, 1.0)[0]
    drift = {n: np.asarray(rng.standard_normal(s), np.float32) for n, s in SHAPES.items()}
    masks = {n: np.asarray(np.logical_not(masked) | (rng.random(s) < 0.6), np.float32) for n, s in SHAPES.items()}
    numbers = scalars(lr=0.1, weight_decay=decay, clip_norm=0.5, momentum=0.9, beta1=0.9, beta2=0.99, epsilon=1e-8)
    state = start(run) | {f(n): masks[n] for n in SHAPES for f in step_contract.state_names(optimizer)}
    extra = {step_contract.mask_name(n): m for n, m in masks.items()}
    extra |= {step_contract.drift_name(n): d for n, d in drift.items()}
    fed = {**numbers, **state, **extra, **given_gradients, step_contract.STEP_NUMBER: np.array(5, np.int64)}
    got = run.run({k: v for k, v in fed.items() if k in run.inputs})
    kept = {n: given_gradients[f"d{n}"] * masks[n] for n in SHAPES}
    norm = np.sqrt(sum(float(np.sum(np.square(v, dtype=np.float64))) for v in kept.values()))
    clipped = {n: kept[n] * min(1.0, 0.5 / (norm + 1e-6)) for n in SHAPES}
    summed = {f"d{n}": ((clipped[n] + drift[n]) * masks[n]).astype(np.float32) for n in SHAPES}
    for name, value in oracle(optimizer, numbers, state, summed, 0, 5, torch.float64).items():
        mask = masks[name.partition("::")[0]]
        expected = value if "::" in name else np.where(mask > 0, value, state[name])
        is_compared = mask > 0 if "::" in name else np.full(mask.shape, True)  # the oracle decays what is masked, too
        np.testing.assert_allclose(
            got[step_contract.next_name(name)][is_compared], expected[is_compared], rtol=1e-5, atol=1e-6
        )
        assert not got[step_contract.next_name(name)][mask == 0].any() or "::" not in name


def test_sums_are_those_of_the_data_loss_alone() -> None:
    run = session("sgd", accumulate=True, proximal=True, clip=True, gradients=True)
    first, second = gradients(2, 4, 1.0)
    state = start(run)
    numbers = scalars(lr=0.1, weight_decay=0.3, clip_norm=0.1, momentum=0.0)
    extra = {step_contract.anchor_name(n): np.full(s, 2, np.float32) for n, s in SHAPES.items()}
    extra |= {step_contract.strength_name(n): np.array(3, np.float32) for n in SHAPES}
    first_part = run.run({**numbers, **state, **extra, **first})
    sums = {
        step_contract.gradient_sum_name(n): first_part[step_contract.next_name(step_contract.gradient_sum_name(n))]
        for n in SHAPES
    }
    last_part = run.run({**numbers, **state, **extra, **second, **sums})
    for name in SHAPES:
        total = first[f"d{name}"] + second[f"d{name}"]
        np.testing.assert_array_equal(sums[step_contract.gradient_sum_name(name)], first[f"d{name}"])
        np.testing.assert_array_equal(last_part[step_contract.next_name(step_contract.gradient_sum_name(name))], total)
        np.testing.assert_allclose(
            last_part[step_contract.gradient_name(name)], total + 3 * (state[name] - 2), rtol=1e-6
        )


class Linear(torch.nn.Linear):
    input_shape = (6,)


class Scaled(Linear):
    """With a parameter without dimensions."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_kept_state_is_that_of_an_optimiser_that_goes_on(optimizer: str) -> None:
    """Two rounds of three steps with all samples each; between them the weights become others, but not the state."""
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((12, 6)).astype(np.float32), rng.integers(0, 3, 12)
    model = fx.load(Scaled(6, 3))
    recipe = Recipe(epochs=3, batch_size=12, lr=0.02, weight_decay=0.01, beta2=0.5, optimizer=optimizer)
    starts = [{n: rng.standard_normal(v.shape).astype(np.float32) for n, v in model.tensors.items()} for _ in range(2)]

    leaves = {n: torch.tensor(v, dtype=torch.float64).requires_grad_() for n, v in starts[0].items()}
    decay, betas = recipe.weight_decay, (recipe.beta1, recipe.beta2)
    factories: dict[str, Any] = {
        "sgd": lambda w: torch.optim.SGD(w, recipe.lr, recipe.momentum, weight_decay=decay),
        "adam": lambda w: torch.optim.Adam(w, recipe.lr, betas, recipe.epsilon, decay),
        "adamw": lambda w: torch.optim.AdamW(w, recipe.lr, betas, recipe.epsilon, decay),
        "lion": lambda w: Lion(w, recipe.lr, betas, decay),
    }
    torchs = factories[optimizer](list(leaves.values()))
    if optimizer == "lion":
        for leaf in leaves.values():
            torchs.state[leaf]["exp_avg"] = torch.zeros_like(leaf)

    trainer, task = Trainer(training_graph(model, recipe.features).to_bytes()), TrainingTask(recipe, 3, 0, "a", 1)
    for start in starts:
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(torch.tensor(start[name]))
        for _ in range(3):
            torchs.zero_grad()
            outputs = (torch.tensor(x, dtype=torch.float64) @ leaves["weight"].T + leaves["bias"]) * leaves["scale"]
            torch.nn.functional.cross_entropy(outputs, torch.tensor(y)).backward()
            torchs.step()
        result = trainer.train(start, LocalData(x, y, x[:0], y[:0]), task)
        expected = {n: leaf.detach().numpy() for n, leaf in leaves.items()}
        assert error(result.tensors, expected) < 1e-6
        assert {n: v.shape for n, v in result.tensors.items()} == {n: v.shape for n, v in start.items()}
        task = TrainingTask(recipe, 3, 0, "a", 2, moments=result.moments, optimizer_steps=result.optimizer_steps)
    assert result.optimizer_steps == 6
    fresh = trainer.train(starts[1], LocalData(x, y, x[:0], y[:0]), TrainingTask(recipe, 3, 0, "a", 2))
    assert error(fresh.tensors, expected) > 1e-3


@pytest.mark.parametrize("warmup", [0, 1.5])
def test_rates_of_a_schedule_are_torchs(warmup: float) -> None:
    """Two rounds of four and eight steps of a job of three; a step has the rate of its middle."""
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((12, 6)).astype(np.float32), rng.integers(0, 3, 12)
    model = fx.load(Linear(6, 3))
    tensors = {n: rng.standard_normal(v.shape).astype(np.float32) for n, v in model.tensors.items()}
    leaves = {n: torch.tensor(v, dtype=torch.float64).requires_grad_() for n, v in tensors.items()}
    trainer = None
    for round_, steps in ((1, 4), (2, 8), (3, 4)):
        # Torch's schedulers by half steps of this round's length.
        still, torchs = (torch.optim.SGD(w, 0.3) for w in ([torch.zeros(1)], list(leaves.values())))
        halves, rates = 2 * steps, []
        after: Any = torch.optim.lr_scheduler.CosineAnnealingLR(still, int(halves * (3 - warmup)))
        if warmup:
            rise = torch.optim.lr_scheduler.LinearLR(still, 1e-12, total_iters=int(halves * warmup))
            after = torch.optim.lr_scheduler.SequentialLR(still, [rise, after], [int(halves * warmup)])
        for _ in range(3 * halves):
            rates.append(still.param_groups[0]["lr"])
            still.step()
            after.step()
        recipe = Recipe(
            epochs=steps, batch_size=12, lr=0.3, momentum=0, lr_warmup=warmup, lr_schedule="cosine", lr_rounds=3
        )
        trainer = trainer or Trainer(training_graph(model, recipe.features).to_bytes())
        for step in range(steps):
            torchs.param_groups[0]["lr"] = rates[(round_ - 1) * halves + 2 * step + 1]
            torchs.zero_grad()
            outputs = torch.tensor(x, dtype=torch.float64) @ leaves["weight"].T + leaves["bias"]
            torch.nn.functional.cross_entropy(outputs, torch.tensor(y)).backward()
            torchs.step()
        tensors = trainer.train(tensors, LocalData(x, y, x[:0], y[:0]), TrainingTask(recipe, 3, 0, "a", round_)).tensors
        assert error(tensors, {n: leaf.detach().numpy() for n, leaf in leaves.items()}) < 1e-6


def test_the_loss_of_samples_whose_labels_are_all_ignored_is_0() -> None:
    recipe, x = Recipe(batch_size=4, ignore_label=255), np.ones((8, 6), np.float32)
    model = fx.load(Linear(6, 3))
    trainer = Trainer(training_graph(model, recipe.features).to_bytes())
    assert trainer.loss(model.tensors, LocalData(x, np.full(8, 255), x[:0], np.zeros(0, np.int64)), recipe, 3) == 0.0
