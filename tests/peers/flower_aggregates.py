"""Runs in Flower's own environment: `python flower_aggregates.py IN.npz OUT.npz` aggregates what IN holds.

IN: `weights` [rounds, clients]; `base/TENSOR`; `ROUND/CLIENT/TENSOR`; `trim`, `momentum`, `rate`.
OUT: `mean/ROUND/TENSOR`, `median/...`, `trimmed/...`, and `momentum/...` of FedAvgM, round after round.
"""

import sys
from typing import Any

import numpy as np
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvgM
from flwr.server.strategy.aggregate import aggregate, aggregate_median, aggregate_trimmed_avg


def main(source: str, target: str) -> None:
    inputs = dict(np.load(source))
    rounds, clients = inputs["weights"].shape
    names = [n.partition("/")[2] for n in inputs if n.startswith("base/")]
    strategy = FedAvgM(
        server_learning_rate=float(inputs["rate"]),
        server_momentum=float(inputs["momentum"]),
        initial_parameters=ndarrays_to_parameters([inputs[f"base/{n}"] for n in names]),
    )
    out: dict[str, Any] = {}
    for r in range(rounds):
        results = [([inputs[f"{r}/{k}/{n}"] for n in names], int(inputs["weights"][r, k])) for k in range(clients)]
        aggregates = {
            "mean": aggregate(results),
            "median": aggregate_median(results),
            "trimmed": aggregate_trimmed_avg(results, float(inputs["trim"])),
        }
        fits: Any = [
            (None, FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), weight, {}))
            for arrays, weight in results
        ]
        parameters, _ = strategy.aggregate_fit(r + 1, fits, [])
        assert parameters is not None
        aggregates["momentum"] = parameters_to_ndarrays(parameters)
        for statistic, arrays in aggregates.items():
            out |= {f"{statistic}/{r}/{n}": v for n, v in zip(names, arrays, strict=True)}
    np.savez(target, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
