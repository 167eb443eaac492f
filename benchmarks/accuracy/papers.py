"""The papers' own questions: scaled down for a processor, and at full size for a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.accuracy.protocol import INT8, Board, Method, Protocol
from fedprune.model.recipe import Recipe

_WORKSTATION = (Board("generic-x86-64"),)
_OWN = "benchmarks.accuracy.compositions:"

_EVALUATED = 3_000  # images of nobody's, on which global models are measured: ten thousand would take longest


def _scaled(images: int) -> dict[str, Any]:
    """Settings of data of so many images of boards' at half size, and `_EVALUATED` ones."""
    return {"most": images + _EVALUATED, "server": _EVALUATED / (images + _EVALUATED), "pooled": True, "pool": 2}


# --- SubFLOT (arXiv 2604.06631)

_SUBFLOT = (
    Method("local", "local"),
    Method("heterofl", "heterofl"),
    Method("slices", f"{_OWN}slices"),
    Method("fedrolex", "fedrolex"),
    Method("subflot", "subflot"),
    Method("fedprune", "fedprune", served_model="average"),
)

SUBFLOT_FULL = Protocol(
    "subflot-cifar10-full",
    "SubFLOT's CIFAR-10 row at full size",
    "cifar10",
    {"partition": "dirichlet", "alpha": 0.1, "devices": 20, "test": 0.25, "standardise": True, "least": 40},
    "vgg11",
    Recipe(epochs=5, batch_size=256, lr=0.001, momentum=0.0),
    200,
    _SUBFLOT,
    every=20,
    every_global=5,
    full=True,
)

SUBFLOT_SMALL = replace(
    SUBFLOT_FULL,
    name="subflot-regime",
    title="SubFLOT's regime, scaled down",
    data={**SUBFLOT_FULL.data, "most": 6_000, "pool": 2},
    net="small_cnn",
    recipe=Recipe(epochs=5, batch_size=25, lr=0.001, momentum=0.0, evaluate_every=5),
    rounds=20,
    methods=(
        *(m for m in _SUBFLOT if m.name not in ("slices", "fedprune")),
        Method("fedavg", "fedavg", densities=False),
        Method("history", "history"),
        Method("without OTP", f"{_OWN}sliced_subflot"),
        Method("without SAR", "subflot", {"sar": 0.0}),
        Method("without OTA", f"{_OWN}in_place_subflot"),
        Method("α .7", "subflot", {"alpha": 0.7}),
        Method("λ 5", "subflot", {"sar": 5.0}),
    ),
    reference="subflot",
    every=5,
    every_global=5,
    minutes=3,
    full=False,
)

# --- CA-HFP (arXiv 2603.12591)

_SCORES = tuple(
    Method(
        f"{score}{'' if fills else ' unfilled'}",
        "ca-hfp",
        {"score": score, "reconstruction": "fill" if fills else "zero"},
    )
    for score, fills in (("curvature", True), ("l1", True), ("random", True), ("curvature", False), ("l1", False))
)

CA_HFP = Protocol(
    "ca-hfp-scores",
    "CA-HFP: scores and reconstruction at equal density",
    "cifar10",
    {"partition": "dirichlet", "alpha": 1.0, "devices": 10, "test": 0.1, "standardise": True, "least": 40,
     **_scaled(6_000)},
    "small_cnn",
    Recipe(epochs=1, batch_size=128, lr=0.1, momentum=0.9, evaluate_every=5),
    40,
    (*_SCORES, Method("curvature signed", "ca-hfp", {"form": "signed"})),
    densities=(0.5,),
    boards=_WORKSTATION,
    reference="l1",
    every=5,
    every_global=5,
    minutes=2,
)  # fmt: skip

CA_HFP_SKEWED = replace(
    CA_HFP,
    name="ca-hfp-scores-skewed",
    title="CA-HFP: scores and reconstruction, Dirichlet .1",
    data={**CA_HFP.data, "alpha": 0.1},
)

_FULL = {"densities": False, "recipe": {"evaluate_every": 1}}

CA_HFP_MIXED = replace(
    CA_HFP,
    name="ca-hfp-mixed",
    title="CA-HFP's Table I: a residual net, pruning ratios of 25, 50 and 75 %",
    net="resnet8",
    methods=(
        Method("ca-hfp", "ca-hfp"),
        Method("l1", "ca-hfp", {"score": "l1"}),
        Method("heterofl", "heterofl"),
        Method("fedavg", "fedavg", **_FULL),
        Method("fedprox", "fedprox", **_FULL),
    ),
    densities=(0.75, 0.5, 0.25),
    reference="ca-hfp",
)

CA_HFP_FULL = replace(
    CA_HFP,
    name="ca-hfp-full",
    title="CA-HFP's Table II at full size",
    data={k: v for k, v in CA_HFP.data.items() if k not in _scaled(0)} | {"pooled": False},
    net="vgg16",
    recipe=replace(CA_HFP.recipe, evaluate_every=1),
    rounds=300,
    every=30,
    every_global=10,
    full=True,
)

# --- PR-FL (arXiv 2403.15439)

DOWN = (20, 18, 12, 10, 6, 4, 2.5, 2, 2, 1.5)
UP = (5, 4, 3, 2.5, 1.5, 1, 0.6, 0.5, 0.5, 0.4)
"""Megabytes a second of the ten devices' links, in the authors' code."""

TIERS = [1.0, 0.6, 0.3, 0.1]
SHARES = [2.0, 2.0, 2.0, 4.0]
"""Its HeteroFL's fixed densities: two devices of 1, two of .6, two of .3, four of .1."""


def _links(scale: float) -> tuple[Board, ...]:
    return tuple(Board("generic-x86-64", d * scale, u * scale) for d, u in zip(DOWN, UP, strict=True))


def _weather(scale: float) -> dict[str, float]:
    return {
        "links_sigma": 0.3, "draws": 20, "server_sigma": 0.1,
        "server_up_mb_s": 10 * scale, "server_down_mb_s": 50 * scale, "server_cache": True,
    }  # fmt: skip


_SCALE = 0.584 / 9.75
"""Links shrink with the network, so that sending it takes as long as in the paper."""

_FIXED = {"densities": TIERS, "shares": SHARES, "stage1": False, "recovery": False}

SCARCE_LINKS = {"densities": [0.5], "arrivals": 2, "dropout": [], "mixup": 0.0, "clip_norm": 0.0}
"""Settings that `docs/strategies/fedprune.md` recommends where links take most of the time."""

_STALE = {"mixing": "share", "staleness": "polynomial", "a": 0.6}
_LARGE_ONLY = ("fedasync α .6", "fedbuff", "pr-fl channels")


def _pr_fl(interval: int, patience: int) -> tuple[Method, ...]:
    """The methods that PR-FL compares. Masks, densities and scores are looked at every `interval` rounds."""
    ours = {"densities": TIERS, "shares": SHARES, "interval": interval, "patience": patience}
    rows = (
        Method("pr-fl", "pr-fl", ours),
        Method("pr-fl synchronous", "pr-fl", {**ours, "synchronous": True}),
        Method("pr-fl without recovery", "pr-fl", {**ours, "recovery": False}),
        Method("pr-fl channels", "pr-fl", {**ours, "masks": "channels"}),
        Method("heterofl (masks)", "pr-fl", {**_FIXED, "interval": interval, "synchronous": True}),
        Method("fedfix", "fedfix", {**_STALE, "window_s": 1.0}),
        Method("fedasync", "fedasync", {**_STALE, "rate": 1.0}),
        Method("fedasync α .6", "fedasync", {"a": 0.5}),
        Method("fedbuff", "fedbuff", {"buffer": 4}),
        Method("fedavg", "fedavg"),
        Method("fedasync int8", "fedasync", {**_STALE, "rate": 1.0}, job=INT8),
        Method("fedprune", "fedprune", {**SCARCE_LINKS, "ranking": "nested"}, job=INT8, served_model="average"),
    )
    return tuple(replace(m, densities=False) for m in rows)


PR_FL_FULL = Protocol(
    "pr-fl-cifar10-full",
    "PR-FL's time to accuracy on CIFAR-10 at full size",
    "cifar10",
    {"partition": "dirichlet", "alpha": 1.0, "devices": 10, "pooled": False, "test": 0.02, "validation": 0.05,
     "standardise": True, "ascending": True, "least": 40},
    "vgg11_plain",
    Recipe(max_steps=5, batch_size=20, lr=0.05, momentum=0.0),
    10_001,
    _pr_fl(50, 10),
    densities=(1.0,),
    boards=_links(1.0),
    weather=_weather(1.0),
    reference="fedasync",
    target=0.80,
    submodels=False,
    every=50,
    every_global=50,
    full=True,
)  # fmt: skip

PR_FL_SMALL = replace(
    PR_FL_FULL,
    name="pr-fl-time",
    title="PR-FL's time to accuracy, scaled down",
    data={**PR_FL_FULL.data, **_scaled(12_000)},
    net="two_cnn",
    recipe=replace(PR_FL_FULL.recipe, lr=0.02, momentum=0.9),
    rounds=100_000,
    methods=tuple(m for m in _pr_fl(20, 3) if not m.job and m.name not in _LARGE_ONLY),
    boards=_links(_SCALE),
    weather=_weather(_SCALE),
    target=0.40,
    seeds=(0, 1, 2),
    until_s=4_000,
    ends_at_target=True,
    every_s=25,
    reads=(1.0,),
    minutes=3,
    full=False,
)

PR_FL_IID = replace(
    PR_FL_SMALL,
    name="pr-fl-time-iid",
    title="PR-FL's time to accuracy, scaled down, equal data",
    data={k: v for k, v in PR_FL_SMALL.data.items() if k not in ("alpha", "ascending")} | {"partition": "iid"},
    methods=tuple(m for m in _pr_fl(20, 3) if m.name in ("pr-fl", "fedasync", "fedasync int8", "fedprune")),
)

# --- FedOBP (arXiv 2604.16574)

_QS = (0.9, 0.99, 0.997, 0.999, 0.9999)

FEDOBP_FULL = Protocol(
    "fedobp-full",
    "FedOBP's sweep of q on CIFAR-10 at full size",
    "cifar10",
    {"partition": "dirichlet", "alpha": 0.1, "devices": 100, "test": 0.25, "standardise": True, "least": 10},
    "avgcnn",
    Recipe(epochs=5, batch_size=32, lr=0.01, momentum=0.7),
    400,
    (
        Method("local", "local", densities=False),
        Method("fedavg", "fedavg", densities=False),
        Method("fedper", "fedper", densities=False),
        *(Method(f"fedobp {q:g}", "fedobp", {"q": q}, densities=False) for q in _QS),
    ),
    densities=(1.0,),
    boards=_WORKSTATION,
    reference="fedavg",
    job={"participation": 0.1},
    submodels=False,
    every=20,
    every_global=20,
    full=True,
)

FEDOBP_SMALL = replace(
    FEDOBP_FULL,
    name="fedobp-q",
    title="FedOBP: a sweep of q, scaled down",
    data={**FEDOBP_FULL.data, "most": 12_000, "pool": 2},
    rounds=50,
    methods=tuple(
        replace(m, strategy=f"{_OWN}counted_fedobp") if m.strategy == "fedobp" else m for m in FEDOBP_FULL.methods
    ),
    every=10,
    every_global=10,
    minutes=4,
    full=False,
)

# --- AutoFLIP (arXiv 2405.10271)

AUTOFLIP_FULL = Protocol(
    "autoflip-full",
    "AutoFLIP on CIFAR-10 at full size",
    "cifar10",
    {"partition": "pathological", "classes": 2, "devices": 20, "pooled": False, "test": 0.2, "validation": 0.1,
     "standardise": True},
    "two_cnn",
    Recipe(epochs=5, batch_size=350, lr=3e-4, optimizer="adam"),
    200,
    (
        Method("fedavg", "fedavg", densities=False),
        Method("autoflip", "autoflip", densities=False),
        Method("autoflip warm", "autoflip", {"warm_start": "explored_mean"}, densities=False),
        Method("autoflip masks", "autoflip", {"structured": False}, densities=False),
    ),
    densities=(1.0,),
    boards=_WORKSTATION,
    reference="fedavg",
    job={"participation": 0.25},
    submodels=False,
    every=10,
    every_global=10,
    full=True,
)  # fmt: skip

AUTOFLIP_SMALL = replace(
    AUTOFLIP_FULL,
    name="autoflip-clean",
    title="AutoFLIP from a clean start, scaled down",
    data={**AUTOFLIP_FULL.data, "most": 6_000, "pool": 2},
    recipe=Recipe(epochs=5, batch_size=64, lr=3e-4, optimizer="adam"),
    rounds=40,
    methods=tuple(
        replace(m, options={"exploration_epochs": 20, **m.options}) if m.strategy != "fedavg" else m
        for m in (*AUTOFLIP_FULL.methods, Method("random masks", f"{_OWN}random_flip", densities=False))
        if m.name != "autoflip warm"
    ),
    every=10,
    every_global=5,
    minutes=3,
    full=False,
)

PAPERS = (
    SUBFLOT_SMALL, CA_HFP, CA_HFP_SKEWED, CA_HFP_MIXED, PR_FL_SMALL, PR_FL_IID, FEDOBP_SMALL, AUTOFLIP_SMALL,
    SUBFLOT_FULL, CA_HFP_FULL, PR_FL_FULL, FEDOBP_FULL, AUTOFLIP_FULL,
)  # fmt: skip
