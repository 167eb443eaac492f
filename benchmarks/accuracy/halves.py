"""Two halves of small tables: constants and switches of strategies are chosen on one and judged on the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.accuracy.protocol import FLOAT32, FULL, INT4, INT8, Method, Protocol
from fedprune.model.recipe import Recipe

_ROWS = (
    # The strategy's own average, not the one that is measured beside every method's weights.
    Method("fedprune", "fedprune", {}, {"average": 0.0}, served_model="average"),
    Method("ordered dropout", "fedprune", {"dropout": [0.25, 0.5, 0.75], "mixup": 0.2}, served_model="average"),
    Method(FULL, "fedavg", {}, {"evaluate_every": 1}, FLOAT32, False),
)

SGD = Recipe(epochs=2, batch_size=32, lr=0.05, momentum=0.9, evaluate_every=3)
ADAM = Recipe(epochs=2, batch_size=32, lr=1e-3, optimizer="adam", momentum=0.0, evaluate_every=3)

DIRICHLET = {"partition": "dirichlet", "alpha": 0.1}
MILD = {"partition": "dirichlet", "alpha": 0.5}
TWO_CLASSES = {"partition": "pathological", "classes": 2}
ONE_MISSING = {"partition": "pathological", "classes": 9}
PEOPLE = {"partition": "owners"}


def _table(
    half: str,
    name: str,
    net: str,
    skew: Mapping[str, Any],
    recipe: Recipe,
    rounds: int,
    job: Mapping[str, Any] = INT8,
    **data: Any,
) -> Protocol:
    source, _, what = name.partition("-")
    fleet = {"test": 0.25, "validation": 0.1, "standardise": True, **data}
    if skew is not PEOPLE:
        fleet = {"devices": 12, "most": 4_000, "least": 40, **fleet}
    return Protocol(
        f"{half}-{name}",
        f"{source}, {what}: {net}, {recipe.optimizer}, {rounds} rounds",
        {"fashion": "fashion_mnist"}.get(source, source),
        {**skew, **fleet},
        net,
        recipe,
        rounds,
        _ROWS if half == "judging" else (_ROWS[0], _ROWS[-1]),
        densities=(1.0, 0.7, 0.5, 0.3),
        reference=FULL,
        job=job,
        submodels=False,
        every=rounds,
        every_global=max(1, rounds // 6),
        minutes=1,
    )


CHOOSING = (
    _table("choosing", "mnist-dirichlet", "attention", DIRICHLET, ADAM, 15),
    _table("choosing", "fashion-two-classes", "attention", TWO_CLASSES, ADAM, 15),
    _table("choosing", "fashion-dirichlet", "mlp", DIRICHLET, SGD, 6),
    _table("choosing", "mnist-mild", "modern", MILD, SGD, 6),
    _table("choosing", "har-mild", "motion_net", MILD, ADAM, 6),
    _table("choosing", "cifar100-dirichlet", "modern", DIRICHLET, ADAM, 15, pool=2, most=8_000),
    _table("choosing", "cifar10-dirichlet", "avgcnn", DIRICHLET, SGD, 15, pool=2),
    _table("choosing", "har-one-missing", "mlp", {**ONE_MISSING, "classes": 5}, ADAM, 15),
    _table("choosing", "cifar100-mild", "resnet8", MILD, SGD, 15, pool=2, most=8_000),
    _table("choosing", "mnist-two-classes", "mean_cnn", TWO_CLASSES, SGD, 30),
    _table("choosing", "har-dirichlet", "recurrent", DIRICHLET, ADAM, 15),
    _table("choosing", "fashion-mild", "small_cnn", MILD, SGD, 15),
)

JUDGING = (
    _table("judging", "fashion-two-classes", "mean_cnn", TWO_CLASSES, SGD, 15),
    _table("judging", "mnist-dirichlet", "mlp", DIRICHLET, SGD, 6),
    _table("judging", "cifar10-mild", "modern", MILD, ADAM, 15, pool=2),
    _table("judging", "cifar100-mild", "small_cnn", MILD, SGD, 15, pool=2, most=8_000),
    _table("judging", "har-people", "recurrent", PEOPLE, ADAM, 15),
    _table("judging", "har-dirichlet", "attention", DIRICHLET, ADAM, 15),
    _table("judging", "fashion-one-missing", "mlp", ONE_MISSING, ADAM, 6),
    _table("judging", "fashion-dirichlet", "avgcnn", DIRICHLET, SGD, 50, INT4),
    _table("judging", "cifar10-two-classes", "resnet8", TWO_CLASSES, SGD, 15, pool=2),
    _table("judging", "mnist-two-classes", "attention", TWO_CLASSES, ADAM, 15),
    _table("judging", "har-two-classes", "motion_net", TWO_CLASSES, ADAM, 50, INT4),
    _table("judging", "fashion-mild", "modern", MILD, SGD, 6),
)
