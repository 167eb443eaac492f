"""Tables of small protocols, for a processor. `papers` has the papers' own protocols."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.accuracy.papers import PAPERS
from benchmarks.accuracy.protocol import FULL, SAME_LOSS, Method, Protocol
from fedprune.model.recipe import Recipe

SLICES = "benchmarks.accuracy.compositions:slices"

ONE_WIDTH = [0.68]
"""One width for all, whose submodel weighs what those of 1, .75, .5 and .25 weigh on average."""

INT8 = {"compression": "int8", "compression_down": "int8"}
"""Codecs of every row that can use them."""

MASKED = {"compression_down": "float16"}
"""Where single weights are masked, boards get no differences, and whole weights in 255 steps are too coarse."""

FLOAT32 = {"compression": "none", "compression_down": "none"}

SMALL = Recipe(epochs=2, batch_size=64, lr=0.05, momentum=0.9, evaluate_every=5)
"""Boards measure themselves in the rounds that tables read; what they train is the same without."""

POOLED = {"devices": 20, "most": 12_000, "pool": 2, "test": 0.25, "validation": 0.1, "standardise": True, "least": 40}
DIRICHLET = {**POOLED, "partition": "dirichlet", "alpha": 0.1}
FEWER = {**DIRICHLET, "most": 6_000}
FIFTY = {**DIRICHLET, "devices": 50, "least": 20}
PATHOLOGICAL = {**POOLED, "most": 6_000, "partition": "pathological", "classes": 2}

_KEEPS = (
    "{images} images of training and test set together, shrunk to {size}, {devices} devices, {partition}; a quarter of "
    "what a device has is its test data, a tenth of the rest its validation data. {net}. SGD, learning rate .05, "
    "momentum .9, batches of 64, 2 local epochs, {asked} in every round, {rounds} rounds. Densities 1, .75, .5 and "
    ".25, {each} devices each; methods whose submodels are made of elements get the shares of elements whose values, "
    "both ways, and mask, to the device, weigh what the submodel weighs, as float32. "
    "Of SubFLOT's protocol this keeps the number of devices, the split, the densities and the metric; images, "
    "networks, learning rate and number of rounds are smaller or other, so figures can't be compared with the "
    "papers', only with each other."
)


_DEALT = {
    "dirichlet": "of every class a share by a Dirichlet distribution of .1",
    "pathological": "two classes each",
}


def _keeps(data: Mapping[str, Any], **settings: Any) -> str:
    """What the small tables have in common, and what differs: their data, and other settings."""
    usual: dict[str, Any] = {
        "size": "16×16",
        "net": "Conv 32-64-128-128 with batch norm",
        "asked": "all devices",
        "rounds": 20,
        "each": "five",
    }
    if unknown := settings.keys() - usual.keys():
        raise KeyError(f"nothing is said of {', '.join(sorted(unknown))}")
    said = {"images": f"{data['most']:,}", "devices": data["devices"], "partition": _DEALT[data["partition"]]}
    return _KEEPS.format(**said, **{**usual, **settings})


def _ours(name: str, options: Mapping[str, Any] | None = None, note: str = "", **settings: Any) -> Method:
    """A row of fedprune's, with options for long jobs (docs/strategies/fedprune.md) and some of its own."""
    options = {"server_momentum": 0.7, "mixup": 0.4, **(options or {})}
    return Method(name, "fedprune", options, note=note, serves="average", samples=True, **settings)


FEDPRUNE = _ours("fedprune")

LONGER = 2.5
"""Rounds of `fedprune` for each round of other rows: within 15 % of full width's bytes and 80 % of its MACs."""


def _all() -> tuple[Method, ...]:
    always = {"evaluate_every": 1}  # what sends more is also read at the rounds in which it has sent no more
    masked = "single weights are masked: weights for boards travel as float16 instead of int8 differences"
    return (
        Method("local", "local", note="every device for itself at its density; nothing is sent after the first model"),
        Method("heterofl", "heterofl"),
        Method("slices", SLICES, note="prefix slices averaged by samples: HeteroFL without scaler and masked classes"),
        Method("fedrolex", "fedrolex"),
        Method("fiarse", "fiarse", {}, always, MASKED, elements=True, note=masked),
        Method("subflot", "subflot"),
        Method("ca-hfp", "ca-hfp"),
        Method("history", "history", note="a device's own last model mixed in by halves, without transport"),
        Method(
            "pr-fl",
            "pr-fl",
            {"stage1": False, "recovery": False, "synchronous": True, "interval": 5, "layer_floor": 0.02},
            always,
            MASKED,
            elements=True,
            note=f"at fixed densities and synchronous, as the others; new masks every 5 rounds; {masked}",
        ),
        Method("fedobp", "fedobp", note="on submodels"),
        FEDPRUNE,
        _ours(
            SAME_LOSS,
            {"densities": [1.0], "dropout": []},
            "full width on every board, with fedprune's local training (adjusted logits, mixup, clipping), server "
            "momentum and moving average: fedprune without narrower widths and ordered dropout",
            recipe=always,
        ),
        Method("fedavg .68", "fedavg", {"densities": ONE_WIDTH}, note="one width for all, at the bytes of the others"),
        Method("fedavg", "fedavg", {}, always, densities=False, note="full width"),
        Method(
            FULL,
            "fedavg",
            {},
            always,
            FLOAT32,
            densities=False,
            note="full width without a codec: its bytes and multiplications are the 100 % of all rows",
        ),
        Method("fedprox", "fedprox", {}, always, densities=False, note="full width"),
        Method("fedper", "fedper", {}, always, densities=False, note="full width"),
        Method(
            "autoflip",
            "autoflip",
            {"exploration_epochs": 20},
            always,
            MASKED,
            densities=False,
            note=f"full width, 20 epochs of exploration; {masked}",
        ),
    )


def _some(*names: str) -> tuple[Method, ...]:
    return tuple(m for m in _all() if m.name in names)


def _longer(methods: Iterable[Method], rounds: int) -> tuple[Method, ...]:
    """Rows in which fedprune trains `LONGER` times the `rounds` of the others."""
    longer = round(LONGER * rounds)
    note = f"{longer} rounds with int4, within 15 % of {FULL}'s bytes and 80 % of its multiplications"
    job = {"rounds": longer, "compression": "int4", "compression_down": "int4"}
    return tuple(
        replace(m, job=job, note=f"{m.note}; {note}".lstrip("; "))
        if m.strategy == "fedprune" and m.name != SAME_LOSS
        else m
        for m in methods
    )


FINALISTS = _some("local", "heterofl", "subflot", "ca-hfp", "fedprune", SAME_LOSS, "fedavg", FULL, "fedper", "autoflip")
"""For tables that show other data, nets and fleets: those that were best or are asked for most."""

CIFAR = Protocol(
    "cifar10-dirichlet",
    "CIFAR-10, Dirichlet .1",
    _keeps(DIRICHLET),
    "cifar10",
    DIRICHLET,
    "small_cnn",
    SMALL,
    20,
    _longer(_all(), 20),
    job=INT8,
    target=0.30,
    minutes=3,
    paper="SubFLOT's Table 1, CIFAR-10 Dirichlet .1, VGG11, learning rate .001, 200 rounds: SubFLOT 83.78, HeteroFL "
    "81.21, FedRolex 81.04.",
)

_FASHION = {
    "source": "fashion_mnist",
    "target": 0.60,
    "paper": "",
}

CIFAR_PATHOLOGICAL = replace(
    CIFAR,
    name="cifar10-pathological",
    title="CIFAR-10, two classes each",
    keeps=_keeps(PATHOLOGICAL),
    data=PATHOLOGICAL,
    paper="SubFLOT's Table 1, CIFAR-10 with two classes each: SubFLOT 86.89, HeteroFL 84.54, FedRolex 84.33.",
)

FASHION, FASHION_PATHOLOGICAL = (
    replace(
        table,
        name=table.name.replace("cifar10", "fashion"),
        title=table.title.replace("CIFAR-10", "Fashion-MNIST"),
        keeps=_keeps(data, size="14×14"),
        data=data,
        **_FASHION,
    )
    for table, data in ((CIFAR, FEWER), (CIFAR_PATHOLOGICAL, PATHOLOGICAL))
)

HAR = replace(
    CIFAR,
    name="har",
    title="HAR: thirty people",
    keeps="All 10,299 windows of accelerometer and gyroscope (9 signals, 128 steps), one device per person, a "
    "quarter of a person's windows for tests. A one-dimensional net, conv 48-96-96 with batch norm. "
    "Local training, densities and rounds as in the tables of images. SubFLOT's protocol has the same people; its "
    "net and split are not known.",
    source="har",
    data={"partition": "owners", "test": 0.25, "validation": 0.1, "standardise": True},
    net="motion_net",
    methods=_longer(FINALISTS, 20),
    target=0.90,
    minutes=5,
    paper="SubFLOT's Table 1, HAR: SubFLOT 79.72, HeteroFL 69.80, FedRolex 68.96. Many repositories scramble this "
    "set by a wrong reshape, which costs that much.",
)

RESNET = replace(
    CIFAR,
    name="cifar10-resnet",
    title="CIFAR-10, Dirichlet .1, a residual net",
    keeps=_keeps(FEWER, net="ResNet-8", rounds=12),
    data=FEWER,
    net="resnet8",
    recipe=replace(SMALL, evaluate_every=3),
    rounds=12,
    methods=_longer(FINALISTS, 12),
    every=3,
    minutes=4,
    target=0.25,
    paper="",
)

TRAINED = replace(
    CIFAR,
    name="cifar10-trained",
    title="CIFAR-10, Dirichlet .1, from a trained net",
    keeps=_keeps(FEWER, rounds=10, net="Conv 32-64-128-128 with batch norm, trained on CIFAR-100 beforehand"),
    data=FEWER,
    net="small_cnn_trained",
    recipe=replace(SMALL, evaluate_every=1),
    rounds=10,
    methods=_longer(
        (*FINALISTS, _ours("fedprune ordered", {"ranking": "ordered"}, "ranks are channels' places in the net")), 10
    ),
    every=1,
    minutes=1,
    paper="",
)

PARTIAL = replace(
    CIFAR,
    name="cifar10-partial",
    title="CIFAR-10, Dirichlet .1, ten of fifty devices a round",
    keeps=_keeps(FIFTY, asked="a fifth of the devices", rounds=50, each="twelve or thirteen"),
    data=FIFTY,
    rounds=50,
    job={**INT8, "participation": 0.2},
    recipe=replace(SMALL, evaluate_every=1),
    methods=_longer(FINALISTS, 50),
    every=10,
    every_global=2,
    paper="",
)

ABLATION = replace(
    CIFAR,
    name="fedprune-ablation",
    title="fedprune, each ingredient left out",
    methods=(
        FEDPRUNE,
        _ours("given start", {"ranking": "ordered"}, "the model begins as it was made, not nested"),
        _ours("no adjustment", {"adjust": False}),
        _ours("no dropout", {"dropout": []}),
        _ours("coverage", {"rule": "coverage"}, "each coordinate's mean over those that hold it"),
        _ours("no momentum", {"server_momentum": 0.0}),
        _ours("no mixup", {"mixup": 0.0}),
        _ours("no clipping", {"clip_norm": 0.0}),
        _ours("no blend", {"blend": 0.0}, "a board's own average serves alone"),
        _ours("one width", {"densities": ONE_WIDTH, "dropout": []}, "equal bytes, one width for all"),
        Method("slices", SLICES),
    ),
    reference="fedprune",
    paper="",
)

SAR = replace(
    FASHION,
    name="subflot-sar",
    title="SubFLOT's pull at a larger learning rate",
    methods=(
        Method("subflot", "subflot", note="λ = 1 at the paper's pull per step"),
        Method("literal pull", "subflot", {"sar_scale": "literal"}, note="λ = 1, whatever the learning rate"),
        Method("no pull", "subflot", {"sar": 0.0}),
        *_some("history"),
    ),
    reference="literal pull",
    job={},
    seeds=(0, 1),
    minutes=2,
)

EIGHT = (CIFAR, CIFAR_PATHOLOGICAL, FASHION, FASHION_PATHOLOGICAL, HAR, RESNET, TRAINED, PARTIAL)
"""Tables of the summary."""

PROTOCOLS = {p.name: p for p in (*EIGHT, ABLATION, SAR, *PAPERS)}
