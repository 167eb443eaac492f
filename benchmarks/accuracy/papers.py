"""The papers' own questions: scaled down for a processor, and at full size for a GPU."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.accuracy.protocol import Board, Method, Protocol
from fedprune.model.recipe import Recipe

_WORKSTATION = (Board("generic-x86-64"),)

# --- SubFLOT (arXiv 2604.06631)

_SUBFLOT = (
    Method("local", "local"),
    Method("heterofl", "heterofl", paper="81.21 (Table 1)"),
    Method("slices", "benchmarks.accuracy.compositions:slices"),
    Method("fedrolex", "fedrolex", paper="81.04 (Table 1)"),
    Method("subflot", "subflot", paper="83.78 (Table 1)"),
    Method("fedprune", "fedprune", serves="average"),
)

SUBFLOT_FULL = Protocol(
    "subflot-cifar10-full",
    "SubFLOT's CIFAR-10 row at full size",
    "SubFLOT's protocol: all 60,000 images at 32×32, 20 devices, Dirichlet .1, VGG11 with batch norm, densities 1, "
    ".75, .5, .25, SGD, learning rate .001, batches of 256, 5 local epochs, 200 rounds, all devices in every round. "
    "What the paper doesn't say is as in PFLlib: training and test images pooled, a quarter of a device's for tests, "
    "plain SGD, no augmentation. The metric is *after*.",
    "cifar10",
    {"partition": "dirichlet", "alpha": 0.1, "devices": 20, "test": 0.25, "standardise": True, "least": 40},
    "vgg11",
    Recipe(epochs=5, batch_size=256, lr=0.001, momentum=0.0),
    200,
    _SUBFLOT,
    every=20,
    every_global=5,
    full=True,
    paper="Table 1: SubFLOT 83.78 ± .16, HeteroFL 81.21, FedRolex 81.04, FlexFL 83.10.",
)

SUBFLOT_SMALL = replace(
    SUBFLOT_FULL,
    name="subflot-regime",
    title="SubFLOT's regime, scaled down",
    keeps="SubFLOT's learning rate (.001, plain SGD), local epochs (5) and steps per round (about 45, by batches of "
    "25 where the paper has 256), densities and number of devices; but 6,000 images at 16×16, conv 32-64-128-128 "
    "with batch norm, and 32 of its 200 rounds.",
    data={**SUBFLOT_FULL.data, "most": 6_000, "pool": 2},
    net="small_cnn",
    recipe=Recipe(epochs=5, batch_size=25, lr=0.001, momentum=0.0, evaluate_every=8),
    rounds=32,
    methods=(
        *(m for m in _SUBFLOT if m.name != "slices"),
        Method("history", "history", note="a device's own last model mixed in by halves, without transport"),
    ),
    seeds=(0,),
    every=8,
    every_global=4,
    minutes=5,
    full=False,
)

# --- CA-HFP (arXiv 2603.12591)

_SCORES = tuple(
    Method(
        f"{score}{'' if fills else ' unfilled'}",
        "ca-hfp",
        {"score": score, "reconstruction": "fill" if fills else "zero"},
        paper=figure,
    )
    for score, fills, figure in (
        ("curvature", True, "73.12 / 90.15 / 91.50 for alpha .1 / 1 / 10 (Table II)"),
        ("l1", True, "54.83 / 86.81 / 88.69"),
        ("random", True, ""),
        ("curvature", False, "62.84 / 88.96 / 90.37"),
        ("l1", False, "54.74 / 84.34 / 84.55"),
    )
)

_CA_HFP_KEEPS = (
    "CA-HFP's number of devices (10), learning rate (.1, momentum .9), batches of 128, one local epoch and ratio (50 "
    "% in every layer, as its Table II seems to have it); but 6,000 training images at 16×16, conv 32-64-128-128 "
    "with batch norm instead of VGG16, Dirichlet {alpha}, 40 rounds instead of 300. The global model is measured on "
    "CIFAR-10's test set. The paper doesn't say how it compares: full global model or submodels, so both are here."
)

CA_HFP = Protocol(
    "ca-hfp-scores",
    "CA-HFP: scores and reconstruction at equal density",
    _CA_HFP_KEEPS.format(alpha="1.0"),
    "cifar10",
    {"partition": "dirichlet", "alpha": 1.0, "devices": 10, "most": 6_000, "pool": 2, "pooled": False, "test": 0.1,
     "standardise": True, "least": 40},
    "small_cnn",
    Recipe(epochs=1, batch_size=128, lr=0.1, momentum=0.9, evaluate_every=5),
    40,
    (
        *_SCORES,
        Method("curvature signed", "ca-hfp", {"form": "signed"}, note="eq. 15 to the letter"),
        Method(
            "fedavg", "fedavg", {}, {"evaluate_every": 1}, densities=False, paper="73.57 / 92.66 / 92.92 (Table I)"
        ),
    ),
    densities=(0.5,),
    boards=_WORKSTATION,
    reference="l1",
    seeds=(0, 1),
    every=5,
    every_global=5,
    minutes=2,
)  # fmt: skip

CA_HFP_SKEWED = replace(
    CA_HFP,
    name="ca-hfp-scores-skewed",
    title="CA-HFP: scores and reconstruction, Dirichlet .1",
    keeps=_CA_HFP_KEEPS.format(alpha=".1"),
    data={**CA_HFP.data, "alpha": 0.1},
    seeds=(0,),
)

CA_HFP_FULL = replace(
    CA_HFP,
    name="ca-hfp-full",
    title="CA-HFP's Table II at full size",
    keeps="CA-HFP's protocol: 50,000 training images at 32×32, ten devices, Dirichlet 1.0, VGG16, half of the "
    "filters of every layer, SGD, learning rate .1, momentum .9, batches of 128, one local epoch, 300 rounds.",
    data={k: v for k, v in CA_HFP.data.items() if k not in ("most", "pool")},
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
        "server_up_bytes_s": 10e6 * scale, "server_down_bytes_s": 50e6 * scale,
    }  # fmt: skip


_SCALE = 0.584 / 9.75
"""Links shrink with the network, so that sending it takes as long as in the paper."""

_FIXED = {"densities": TIERS, "shares": SHARES, "stage1": False, "recovery": False}
_INT8_UP = {"compression": "int8"}
_INT8 = {**_INT8_UP, "compression_down": "int8"}
_CODED = "updates as int8 differences"

SCARCE_LINKS = {"densities": [0.5], "arrivals": 2, "dropout": [], "mixup": 0.0, "clip_norm": 0.0}
"""Settings that `docs/strategies/fedprune.md` recommends where links take most of the time."""

_STALE = {"mixing": "share", "staleness": "polynomial", "a": 0.6}


def _pr_fl(interval: int, patience: int) -> tuple[Method, ...]:
    """The methods that PR-FL compares: those that prune with the densities that the authors' code begins with.

    Args:
        interval: Rounds between looks at masks, densities and early stopping.
        patience: In such looks.
    """
    ours = {"densities": TIERS, "shares": SHARES, "interval": interval, "patience": patience}
    rows = (
        Method("pr-fl", "pr-fl", ours, paper="80 % IID / non-IID: 26,300 / 29,700 s; 84 %: 39,100 / 52,500 s"),
        Method("pr-fl synchronous", "pr-fl", {**ours, "synchronous": True}),
        Method("pr-fl without recovery", "pr-fl", {**ours, "recovery": False}),
        Method("pr-fl channels", "pr-fl", {**ours, "masks": "channels"}, note="masks of whole channels"),
        Method(
            "heterofl (masks)",
            "pr-fl",
            {**_FIXED, "interval": interval, "synchronous": True},
            paper="40,900 / 44,500; 70,900 / 97,900 s",
            note="as in the authors' code: unstructured masks at fixed densities, synchronous",
        ),
        Method("fedfix", "fedfix", {**_STALE, "window_s": 1.0}, paper="48,000 / 59,100; 108,700 / 111,500 s"),
        Method("fedasync", "fedasync", {**_STALE, "rate": 1.0}, paper="70,100 / 82,800; 113,700 / 172,500 s"),
        Method("fedasync α .6", "fedasync", {"a": 0.5}, note="Xie et al.'s own mixing, α s(k)"),
        Method("fedbuff", "fedbuff", {"buffer": 4}),
        Method("fedavg", "fedavg", paper="202,200 / 210,900 s; 84 % never"),
        Method("pr-fl int8", "pr-fl", ours, job=_INT8_UP, note=_CODED),
        Method("fedasync int8", "fedasync", {**_STALE, "rate": 1.0}, job=_INT8, note=f"{_CODED}, and weights"),
        Method(
            "fedprune",
            "fedprune",
            {**SCARCE_LINKS, "ranking": "nested"},
            job=_INT8,
            note="half of the channels, two updates a move, int8 both ways; nested by option, as a net without "
            "normalisations doesn't tell",
            serves="average",
        ),
    )
    return tuple(replace(m, densities=False) for m in rows)


PR_FL_FULL = Protocol(
    "pr-fl-cifar10-full",
    "PR-FL's time to accuracy on CIFAR-10 at full size",
    "PR-FL's protocol: ten devices behind the links of the authors' code, Dirichlet 1.0, devices with less data "
    "behind faster links, VGG-11 without batch norm (9.75 M parameters), 5 local steps of 20 samples, learning rate "
    ".25 in theirs with a mean of binary cross-entropies over ten classes, here cross-entropy at .05; 10,001 rounds. "
    "Compute is the same for all, by the planner's prediction where theirs was measured.",
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

_LEFT_OUT = ("fedasync α .6", "fedbuff")

PR_FL_SMALL = replace(
    PR_FL_FULL,
    name="pr-fl-time",
    title="PR-FL's time to accuracy, scaled down",
    keeps="PR-FL's ten links, its distribution of data (Dirichlet 1.0, less data behind faster links) and local "
    "training (5 steps of 20 samples); but 12,000 training images at 16×16 and two convolutions with 512 hidden "
    "units. Links shrink with the network, so that sending it takes as long as in the paper. "
    "Learning rate .02, momentum .9 and cross-entropy, where theirs is .25 with a mean of binary cross-entropies. "
    "Masks, densities and early stopping are looked at every 20 rounds (theirs: 50), with a patience of 3 (10). "
    "Every run ends at 40 %, or after 4,000 simulated seconds.",
    data={**PR_FL_FULL.data, "most": 12_000, "pool": 2},
    net="two_cnn",
    recipe=replace(PR_FL_FULL.recipe, lr=0.02, momentum=0.9),
    rounds=100_000,
    methods=tuple(m for m in _pr_fl(20, 3) if m.name not in _LEFT_OUT),
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
    keeps="As `pr-fl-time`, but every device has an equal share of the data, drawn at random.",
    data={k: v for k, v in PR_FL_SMALL.data.items() if k not in ("alpha", "ascending")} | {"partition": "iid"},
    methods=tuple(m for m in PR_FL_SMALL.methods if m.name in ("pr-fl", "fedasync", "fedprune")),
)

# --- FedOBP (arXiv 2604.16574)

_QS = (0.9, 0.99, 0.997, 0.999, 0.9999)
_OBP = {0.9: "82.8", 0.99: "84.6", 0.997: "85.66", 0.999: "84.4", 0.9999: "77.8 at 200 rounds; 87.75 at best (400)"}

FEDOBP_FULL = Protocol(
    "fedobp-full",
    "FedOBP's sweep of q on CIFAR-10 at full size",
    "FedOBP's protocol: 100 devices, ten in every round, Dirichlet .1, a quarter of a device's images for tests, "
    "conv 32-64 and 512 hidden units without batch norm (878,538 parameters), SGD, learning rate .01, momentum .7, "
    "batches of 32, 5 local epochs, 400 rounds. Its metric is *before*: what a device is sent, on its own test data.",
    "cifar10",
    {"partition": "dirichlet", "alpha": 0.1, "devices": 100, "test": 0.25, "standardise": True, "least": 10},
    "avgcnn",
    Recipe(epochs=5, batch_size=32, lr=0.01, momentum=0.7),
    400,
    (
        Method("local", "local", densities=False, paper="81.08"),
        Method("fedavg", "fedavg", densities=False, paper="58.59"),
        Method("fedper", "fedper", densities=False, paper="85.73"),
        *(Method(f"fedobp {q:g}", "fedobp", {"q": q}, densities=False, paper=_OBP[q]) for q in _QS),
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
    keeps="FedOBP's local training (SGD, .01, momentum .7, batches of 32, 5 epochs), its network (for 16×16 images) "
    "and a tenth of 100 devices in every round, Dirichlet .1; but 12,000 images at 16×16 and 50 rounds of its 400. "
    "Its metric is *before*: what a device is sent, on its own test data; a device's value is that of its last "
    "visit.",
    data={**FEDOBP_FULL.data, "most": 12_000, "pool": 2},
    rounds=50,
    seeds=(0, 1),
    every=10,
    every_global=10,
    minutes=4,
    full=False,
)

# --- AutoFLIP (arXiv 2405.10271)

AUTOFLIP_FULL = Protocol(
    "autoflip-full",
    "AutoFLIP on CIFAR-10 at full size",
    "AutoFLIP's protocol: 20 devices with two classes each, a quarter of them in every round, two convolutions and "
    "512 hidden units, Adam at 3e-4 (.99 per round), batches of 350, 5 local epochs, 200 rounds, 30 % pruned, up to "
    "150 epochs of exploration. Training begins with the initial weights for all; in the authors' released runs "
    "AutoFLIP's begins with a model that every device's data has trained. No augmentation.",
    "cifar10",
    {"partition": "pathological", "classes": 2, "devices": 20, "pooled": False, "test": 0.2, "validation": 0.1,
     "standardise": True},
    "two_cnn",
    Recipe(epochs=5, batch_size=350, lr=3e-4, optimizer="adam"),
    200,
    (
        Method("fedavg", "fedavg", densities=False, paper="70.87 (log, round 200)"),
        Method("autoflip", "autoflip", densities=False, paper="74.06 (log, round 200; from a trained start)"),
        Method("autoflip warm", "autoflip", {"warm_start": "explored_mean"}, densities=False),
        Method("autoflip masks", "autoflip", {"structured": False}, densities=False, note="elements only"),
        Method(
            "autoflip 95 %",
            "autoflip",
            {"masked_share": 0.95},
            densities=False,
            note="a channel of whose weights 95 % are masked is cut, too",
        ),
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
    keeps="AutoFLIP's devices, participation, network (for 16×16 images), optimiser and share of pruned elements; "
    "but 6,000 images at 16×16, batches of 64, 40 rounds of its 200 and up to 20 epochs of exploration of its 150. "
    "Both begin with the same initial weights.",
    data={**AUTOFLIP_FULL.data, "most": 6_000, "pool": 2},
    recipe=Recipe(epochs=5, batch_size=64, lr=3e-4, optimizer="adam"),
    rounds=40,
    methods=tuple(
        replace(m, options={"exploration_epochs": 20, **m.options}) if m.strategy == "autoflip" else m
        for m in AUTOFLIP_FULL.methods
        if m.name != "autoflip warm"
    ),
    seeds=(0, 1),
    every=10,
    every_global=5,
    minutes=3,
    full=False,
)

PAPERS = (
    SUBFLOT_SMALL, CA_HFP, CA_HFP_SKEWED, PR_FL_SMALL, PR_FL_IID, FEDOBP_SMALL, AUTOFLIP_SMALL,
    SUBFLOT_FULL, CA_HFP_FULL, PR_FL_FULL, FEDOBP_FULL, AUTOFLIP_FULL,
)  # fmt: skip
