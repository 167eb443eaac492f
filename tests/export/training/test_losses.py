"""Losses of the training graph and their gradients against torch, on outputs of any size and shape."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.nn import functional

from fedprune.model import step_contract
from fedprune.model.features import MULTI_LABELS, Features, labels_of
from fedprune.model.step_feeds import divisor_share
from fedprune.runtime.session import OnnxSession
from fedprune_export.autodiff.tape import BATCH, port
from fedprune_export.ir.graph import Graph
from fedprune_export.training.losses import target_shape, write_loss
from support.oracles.torch_losses import distill

pytestmark = pytest.mark.torch

Array = np.ndarray[Any, Any]
K = 4
IGNORED = 255
POSITIONS: tuple[tuple[int, ...], ...] = ((), (3,), (2, 2))
"""Shapes of what a model says of each sample: one row of outputs, or one at each place."""

LOSSES = {
    "plain": Features(),
    "weights": Features(class_weight=True),
    "smooth": Features(label_smoothing=True),
    "all of cross-entropy": Features(True, True, True, label_smoothing=True),
    "mixup": Features(label_pairs=True),
    "all of cross-entropy with mixup": Features(True, True, True, label_smoothing=True, label_pairs=True),
    "ignore": Features(ignore_label=IGNORED),
    "ignore one that is a class": Features(ignore_label=2),
    "ignore with all": Features(True, True, True, label_smoothing=True, ignore_label=IGNORED),
    "bce": Features(loss="bce"),
    "bce weights": Features(loss="bce", class_weight=True),
    "mse": Features(loss="mse"),
    "l1": Features(loss="l1"),
    "huber": Features(loss="huber"),
    "distill": Features(loss="distill"),
}


@cache
def session(name: str, accumulates: bool = False, positions: tuple[int, ...] = ()) -> OnnxSession:
    """The loss alone, with the gradient by the logits."""
    outputs = (K, *positions)
    features = Features(**{**LOSSES[name].__dict__, "accumulate": accumulates})
    g = Graph(name="loss")
    g.inputs = [port("z", (BATCH, *outputs)), port(step_contract.Y, *target_shape(features, outputs))]
    g.outputs = [port(step_contract.LOSS, ())]
    g.emit("Identity", write_loss(g, "z", outputs, features), out="dz")
    g.outputs.append(port("dz", (BATCH, *outputs)))
    return OnnxSession(g.to_bytes(), training=True)


def numbers(seed: int) -> dict[str, Array]:
    """What the losses read besides logits and labels."""
    rng = np.random.default_rng(seed)
    return {
        step_contract.LOGIT_OFFSET: rng.standard_normal(K).astype(np.float32),
        step_contract.CLASS_WEIGHT: rng.uniform(0.1, 3, K).astype(np.float32),
        step_contract.CLASS_MASK: np.array([1, 0, 1, 1], np.float32),
        step_contract.LABEL_SMOOTHING: np.array(rng.uniform(0, 1), np.float32),
        "huber_delta": np.array(rng.uniform(0.1, 3), np.float32),
        "distill_temperature": np.array(rng.uniform(0.5, 5), np.float32),
        step_contract.Y_SHARE: np.array(rng.choice([0, 1, rng.uniform(0, 1)]), np.float32),
    }


def labels(features: Features, batch: int, seed: int, positions: tuple[int, ...] = ()) -> Array:
    rng, shape = np.random.default_rng([seed, batch]), (batch, *features.target_shape((K, *positions)))
    if features.loss == "cross_entropy":
        y = rng.integers(0, K, shape)
        if features.ignore_label is not None:
            y = np.where(rng.random(shape) < 0.3, features.ignore_label, y)
            y.flat[0] = 1  # torch knows no mean of nothing
        return y
    if labels_of(features.loss) == MULTI_LABELS:
        return rng.choice([0, 1, 0.3], shape, p=[0.5, 0.4, 0.1]).astype(np.float32)
    return (3 * rng.standard_normal(shape)).astype(np.float32)


def partners(y: Array, seed: int) -> Array:
    """The same labels in another order."""
    return np.random.default_rng([seed, 1]).permutation(y)


def oracle(features: Features, z: Array, y: Array, extra: dict[str, Array], dtype: torch.dtype) -> dict[str, Array]:
    get = {k: torch.tensor(v, dtype=dtype) for k, v in extra.items()}
    leaf = torch.tensor(z, dtype=dtype, requires_grad=True)
    x, weight = leaf, get[step_contract.CLASS_WEIGHT] if features.class_weight else None
    along = (K, *[1] * (z.ndim - 2))
    if features.logit_offset:
        x = x + get[step_contract.LOGIT_OFFSET].reshape(along)
    if features.class_mask:
        x = torch.where(get[step_contract.CLASS_MASK].reshape(along) > 0, x, torch.zeros_like(x))
    ignored = -100 if features.ignore_label is None else features.ignore_label
    target = torch.tensor(y) if y.dtype == np.int64 else torch.tensor(y, dtype=dtype)
    share = get[step_contract.Y_SHARE] if features.label_pairs else torch.ones((), dtype=dtype)
    partner = torch.tensor(extra[step_contract.Y_PARTNER]) if features.label_pairs else target
    if features.loss == "cross_entropy":
        smooth = float(extra[step_contract.LABEL_SMOOTHING]) if features.label_smoothing else 0.0
        own_mean, partner_mean = (
            functional.cross_entropy(x, t, weight, ignore_index=ignored, label_smoothing=smooth)
            for t in (target, partner)
        )
        mean = share * own_mean + (1 - share) * partner_mean
    else:
        of_sample = {
            "bce": lambda: functional.binary_cross_entropy_with_logits(
                x, target, pos_weight=None if weight is None else weight.reshape(along), reduction="none"
            ),
            "mse": lambda: functional.mse_loss(x, target, reduction="none"),
            "l1": lambda: functional.l1_loss(x, target, reduction="none"),
            "huber": lambda: functional.huber_loss(x, target, reduction="none", delta=float(extra["huber_delta"])),
            "distill": lambda: distill(x, target, float(extra["distill_temperature"])),
        }
        mean = of_sample[features.loss]().mean()
    mean.backward()
    assert leaf.grad is not None
    outputs = {step_contract.LOSS: mean, "dz": leaf.grad}
    if features.loss == "cross_entropy":
        meant = target if share >= 0.5 else partner
        outputs[step_contract.HITS] = ((x.argmax(1) == meant) & (meant != ignored)).sum()
    if labels_of(features.loss) == MULTI_LABELS:
        outputs[step_contract.HITS] = ((x > 0) == (target > 0.5)).sum()
    return {k: v.detach().numpy() for k, v in outputs.items()}


def error(got: Array, want: Array) -> float:
    return float(np.linalg.norm((got - want).ravel()) / max(float(np.linalg.norm(want.ravel())), 1e-30))


numbers_near_and_far = st.floats(-90, 90, width=32) | st.floats(-2, 2, width=32)
logits = st.integers(1, 9).flatmap(lambda n: arrays.arrays(np.float32, (n, K), elements=numbers_near_and_far))
positions_and_logits = st.tuples(st.sampled_from(POSITIONS), st.integers(1, 5)).flatmap(
    lambda drawn: arrays.arrays(np.float32, (drawn[1], K, *drawn[0]), elements=numbers_near_and_far)
)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=60, deadline=None)
@given(z=positions_and_logits, seed=st.integers(0, 99))
def test_a_loss_and_its_gradient_are_torchs(name: str, z: Array, seed: int) -> None:
    positions = z.shape[2:]
    features, run = LOSSES[name], session(name, positions=positions)
    y, extra = labels(features, len(z), seed, positions), numbers(seed)
    extra[step_contract.Y_PARTNER] = partners(y, seed)
    exact, usual = (oracle(features, z, y, extra, t) for t in (torch.float64, torch.float32))
    got = run.run({k: v for k, v in {"z": z, step_contract.Y: y, **extra}.items() if k in run.inputs})
    assert set(got) == set(exact)
    # Where terms cancel, what is left is as exact as the terms: the largest of them is as large as a logit.
    floor = 2e-7 * (1 + float(np.abs(z).max()))
    for key, value in exact.items():
        off = float(np.max(np.abs(got[key] - value)))
        assert off <= floor or error(got[key], value) <= max(1e-6, 2 * error(usual[key], value)), key


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_add_up_to_its_loss_and_gradient(name: str, positions: tuple[int, ...]) -> None:
    features = LOSSES[name]
    rng = np.random.default_rng(5)
    z, y, extra = (
        rng.standard_normal((11, K, *positions)).astype(np.float32), labels(features, 11, 5, positions), numbers(5),
    )  # fmt: skip
    weights = extra[step_contract.CLASS_WEIGHT] if features.class_weight else None
    extra[step_contract.DIVISOR] = np.array(divisor_share(y, features.ignore_label, weights), np.float32)
    split = np.array_split(np.arange(11), 3)
    partner = np.concatenate([partners(y[rows], 5) for rows in split])
    run, exact = (
        session(name, True, positions),
        oracle(features, z, y, {**extra, step_contract.Y_PARTNER: partner}, torch.float64),
    )
    results = []
    for rows in split:
        fed = {"z": z[rows], step_contract.Y: y[rows], step_contract.Y_PARTNER: partner[rows], **extra}
        results.append(run.run({k: v for k, v in fed.items() if k in run.inputs}))
    assert sum(float(f[step_contract.LOSS]) for f in results) == pytest.approx(
        float(exact[step_contract.LOSS]), rel=1e-6
    )
    assert error(np.concatenate([f["dz"] for f in results]), exact["dz"]) < 1e-6
    if step_contract.HITS in exact:
        assert sum(int(f[step_contract.HITS]) for f in results) == exact[step_contract.HITS]


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_outputs_give_finite_losses(name: str) -> None:
    features, run, extra = LOSSES[name], session(name), numbers(1)
    z = np.array([[1e6, -1e6, 0, 1], [-1e6, 1e6, 1e-30, -1e-30]], np.float32)
    y = labels(features, 2, 0)
    fed = {"z": z, step_contract.Y: y, step_contract.Y_PARTNER: y[::-1].copy(), **extra}
    got = run.run({k: v for k, v in fed.items() if k in run.inputs})
    assert all(np.isfinite(v).all() for v in got.values())


@pytest.mark.parametrize("name", ["ignore", "ignore with all"])
def test_a_batch_whose_labels_all_count_for_nothing_has_no_loss_and_no_gradient(name: str) -> None:
    z, y = np.ones((2, K, 3), np.float32), np.full((2, 3), IGNORED)
    run = session(name, positions=(3,))
    got = run.run({k: v for k, v in {"z": z, step_contract.Y: y, **numbers(1)}.items() if k in run.inputs})
    assert {k: float(np.abs(v).max()) for k, v in got.items()} == dict.fromkeys(got, 0.0)


def test_small_losses_keep_their_digits() -> None:
    z = np.array([[20, -20, 40, -40]], np.float32)
    got = session("bce").run({"z": z, step_contract.Y: np.array([[1, 0, 1, 0]], np.float32)})
    np.testing.assert_allclose(got["dz"][0] * K, [-np.exp(-20), np.exp(-20), -np.exp(-40), np.exp(-40)], rtol=1e-6)
    assert got[step_contract.LOSS] == pytest.approx(np.exp(-20) / 2, rel=1e-6)
