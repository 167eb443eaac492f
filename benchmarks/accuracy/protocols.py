"""Tables of small protocols, for a processor. `papers` has the papers' own protocols."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.accuracy.halves import CHOOSING, JUDGING
from benchmarks.accuracy.papers import PAPERS
from benchmarks.accuracy.protocol import FLOAT32, FULL, INT4, INT8, SAME_LOSS, Method, Protocol
from fedprune.model.recipe import Recipe

SLICES = "benchmarks.accuracy.compositions:slices"

ONE_WIDTH = [0.68]
"""One width for all, whose submodel weighs what those of 1, .75, .5 and .25 weigh on average."""

SMALL = Recipe(epochs=2, batch_size=64, lr=0.05, momentum=0.9, evaluate_every=5)
"""Boards measure themselves in the rounds that tables read; what they train is the same without."""

POOLED = {"devices": 20, "most": 12_000, "pool": 2, "test": 0.25, "validation": 0.1, "standardise": True, "least": 40}
DIRICHLET = {**POOLED, "partition": "dirichlet", "alpha": 0.1}
FEWER = {**DIRICHLET, "most": 6_000}
FIFTY = {**DIRICHLET, "devices": 50, "least": 20}
PATHOLOGICAL = {**POOLED, "most": 6_000, "partition": "pathological", "classes": 2}


def _ours(name: str, options: Mapping[str, Any] | None = None, **settings: Any) -> Method:
    """A row of fedprune's, with ordered dropout and its options (docs/strategies/fedprune.md), and some of its own."""
    options = {"dropout": [0.25, 0.5, 0.75], "server_momentum": 0.7, "mixup": 0.4, **(options or {})}
    return Method(name, "fedprune", options, served_model="average", samples=True, **settings)


FEDPRUNE = _ours("fedprune")
CORE = Method("fedprune core", "fedprune", {}, {"average": 0.0}, served_model="average", samples=True)
"""`fedprune` with its default options, and so with a core and the strategy's own average."""
LONGER, CORE_LONGER = 2.5, 1.35  # rounds for one of others', within 15 % of full width's bytes and 80 % of its MACs

_DRIFTS, _OURS = ("scaffold", "feddyn", "fedcm"), (FEDPRUNE.name, CORE.name, SAME_LOSS)


def _all() -> tuple[Method, ...]:
    always = {"evaluate_every": 1}  # what sends more is also read at the rounds in which it has sent no more
    return (
        Method("local", "local"),
        Method("heterofl", "heterofl"),
        Method("slices", SLICES),
        Method("fedrolex", "fedrolex"),
        Method("fiarse", "fiarse", {}, always, elements=True),
        Method("subflot", "subflot"),
        Method("ca-hfp", "ca-hfp"),
        Method("history", "history"),
        Method(
            "pr-fl",
            "pr-fl",
            {"stage1": False, "recovery": False, "synchronous": True, "interval": 5, "layer_floor": 0.02},
            always,
            elements=True,
        ),
        Method("fedobp", "fedobp"),
        FEDPRUNE,
        CORE,
        _ours(SAME_LOSS, {"densities": [1.0], "dropout": []}, recipe=always),
        Method("fedavg .68", "fedavg", {"densities": ONE_WIDTH}),
        Method("fedavg", "fedavg", {}, always, densities=False),
        Method(FULL, "fedavg", {}, always, FLOAT32, densities=False),
        Method("fedprox", "fedprox", {}, always, densities=False),
        Method("fedper", "fedper", {}, always, densities=False),
        Method("autoflip", "autoflip", {"exploration_epochs": 20}, always, densities=False),
        *(Method(name, name, {}, always, densities=False) for name in _DRIFTS),
    )


def _some(*names: str) -> tuple[Method, ...]:
    return tuple(m for m in _all() if m.name in names)


def _longer(methods: Iterable[Method], rounds: int) -> tuple[Method, ...]:
    """Rows in which fedprune trains longer than the `rounds` of the others."""
    job = {"rounds": round(LONGER * rounds), **INT4}
    jobs = {CORE.name: {"rounds": round(CORE_LONGER * rounds), **INT8}, SAME_LOSS: {}}
    return tuple(replace(m, job=jobs.get(m.name, job)) if m.strategy == "fedprune" else m for m in methods)


FINALISTS = _some("local", "heterofl", "subflot", "ca-hfp", *_OURS, "fedavg", FULL, "fedper", "autoflip", *_DRIFTS)
"""For tables that show other data, nets and fleets: those that were best or are asked for most."""

CIFAR = Protocol(
    "cifar10-dirichlet",
    "CIFAR-10, Dirichlet .1",
    "cifar10",
    DIRICHLET,
    "small_cnn",
    SMALL,
    20,
    _longer(_all(), 20),
    job=INT8,
    target=0.30,
    minutes=3,
)

_FASHION = {"source": "fashion_mnist", "target": 0.60}

CIFAR_PATHOLOGICAL = replace(CIFAR, name="cifar10-pathological", title="CIFAR-10, two classes each", data=PATHOLOGICAL)

FASHION, FASHION_PATHOLOGICAL = (
    replace(
        table,
        name=table.name.replace("cifar10", "fashion"),
        title=table.title.replace("CIFAR-10", "Fashion-MNIST"),
        data=data,
        **_FASHION,
    )
    for table, data in ((CIFAR, FEWER), (CIFAR_PATHOLOGICAL, PATHOLOGICAL))
)

HAR = replace(
    CIFAR,
    name="har",
    title="HAR: thirty people",
    source="har",
    data={"partition": "owners", "test": 0.25, "validation": 0.1, "standardise": True},
    net="motion_net",
    methods=_longer(FINALISTS, 20),
    target=0.90,
    minutes=5,
)

RESNET = replace(
    CIFAR,
    name="cifar10-resnet",
    title="CIFAR-10, Dirichlet .1, a residual net",
    data=FEWER,
    net="resnet8",
    recipe=replace(SMALL, evaluate_every=3),
    rounds=12,
    methods=_longer(FINALISTS, 12),
    every=3,
    minutes=4,
    target=0.25,
)

TRAINED = replace(
    CIFAR,
    name="cifar10-trained",
    title="CIFAR-10, Dirichlet .1, from a trained net",
    data=FEWER,
    net="small_cnn_trained",
    recipe=replace(SMALL, evaluate_every=1),
    rounds=10,
    methods=_longer((*FINALISTS, _ours("fedprune ordered", {"ranking": "ordered"})), 10),
    every=1,
    minutes=1,
)

PARTIAL = replace(
    CIFAR,
    name="cifar10-partial",
    title="CIFAR-10, Dirichlet .1, ten of fifty devices a round",
    data=FIFTY,
    rounds=50,
    job={**INT8, "participation": 0.2},
    recipe=replace(SMALL, evaluate_every=1),
    methods=_longer(FINALISTS, 50),
    every=10,
    every_global=2,
)

SAR = replace(
    FASHION,
    name="subflot-sar",
    title="SubFLOT's pull at a larger learning rate",
    methods=(
        Method("subflot", "subflot"),
        Method("literal pull", "subflot", {"sar_scale": "literal"}),
        Method("no pull", "subflot", {"sar": 0.0}),
        *_some("history"),
    ),
    reference="literal pull",
    job={},
    minutes=2,
)

EIGHT = (CIFAR, CIFAR_PATHOLOGICAL, FASHION, FASHION_PATHOLOGICAL, HAR, RESNET, TRAINED, PARTIAL)
"""Tables of the summary."""

PROTOCOLS = {p.name: p for p in (*EIGHT, SAR, *PAPERS, *CHOOSING, *JUDGING)}
