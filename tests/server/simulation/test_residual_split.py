"""PR-FL's residual split: bytes that leave the server once, for boards that get the same models as without it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.model.recipe import Recipe
from fedprune.updates import increments
from fedprune_server.simulation.network_model import Weather, cached_transfer_end, transfer_end
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import boards, digits_simulation, noting

DENSITIES = (1.0, 0.6, 0.3, 0.2, 0.1)
BOARDS = tuple(f"board-{i:02}" for i in range(20))


class Fleet:
    """Twenty boards that train a round or two, and the offers that they got; its store keeps everything."""

    def __init__(self, folder: Path, *, rounds: int = 1, weather: Weather | None = None, **options: Any) -> None:
        self.offers: list[dict[str, Mapping[str, Any]]] = [{} for _ in range(rounds)]
        fleet = [noting(board, self._note) for board in boards(BOARDS, kind="raspberry-pi-4b")]
        options = {"densities": list(DENSITIES), "stage1": False, "synchronous": True} | options
        recipe, environment = Recipe(max_steps=2, batch_size=16), {} if weather is None else {"weather": weather}
        self.simulation: Simulation = digits_simulation(
            folder, keeps_state=False, fleet=fleet, strategy="pr-fl", rounds=rounds, options=options, recipe=recipe,
            **environment,
        )  # fmt: skip
        self.simulation.store.delete = lambda digest: None  # type: ignore[method-assign]
        self.models = [h["model"] for h in self.simulation.run()]

    def _note(self, name: str, offer: Mapping[str, Any]) -> None:
        self.offers[name in self.offers[0]][name] = offer


def downloads(offer: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of an offer's submodel by digest, as its board downloads it."""
    return {ref["sha256"]: ref["size"] for ref in offer.get("increments", whole(offer))}


def whole(offer: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [offer[name] for name in ("weights", "mask") if name in offer]


def whole_size(offer: Mapping[str, Any]) -> int:
    return sum(ref["size"] for ref in whole(offer))


def test_twenty_boards_of_five_densities_cost_the_server_the_densest_submodel(tmp_path: Path) -> None:
    split, plain = Fleet(tmp_path / "split", rounds=2), Fleet(tmp_path / "plain", rounds=2, split=False)
    assert split.models == plain.models
    for offers, plain_offers in zip(split.offers, plain.offers, strict=True):
        leaving: dict[str, int] = {}
        for name, offer in offers.items():
            assert whole(offer) == whole(plain_offers[name])
            assert sum(downloads(offer).values()) <= whole_size(offer)
            leaving |= downloads(offer)
        assert len(leaving) == len(DENSITIES)
        densest = max(map(whole_size, offers.values()))
        assert sum(leaving.values()) <= 1.1 * densest
        # Each distinct submodel once, as caches serve them without the split.
        assert sum({r["sha256"]: r["size"] for o in offers.values() for r in whole(o)}.values()) > 2 * densest


def test_each_of_many_densities_is_made_of_few_increments(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, densities=[0.05 * n for n in range(1, 21)])
    (offers,), read = fleet.offers, fleet.simulation.store.read
    for offer in offers.values():
        made = increments.decode((read(ref["sha256"]) for ref in offer["increments"]), 10**6, 10**6)
        assert [tensorfile.sha256_hex(file) for file in made if file] == [ref["sha256"] for ref in whole(offer)]
    assert max(len(offer["increments"]) for offer in offers.values()) == 12
    # Eight boards are between two levels, and share all but their last increments.
    assert len({digest for offer in offers.values() for digest in downloads(offer)}) == 20


def test_boards_of_one_density_are_sent_nothing_else(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, densities=[0.3])
    assert not any("increments" in offer for offers in fleet.offers for offer in offers.values())


def test_a_cache_before_the_server_saves_time_and_changes_no_model(tmp_path: Path) -> None:
    runs = []
    for cache, split in ((True, True), (True, False), (False, False)):
        weather = Weather(server_up_mb_s=3.0, server_cache=cache)
        runs.append(Fleet(tmp_path / f"{cache}{split}", weather=weather, split=split))
    assert len({tuple(run.models) for run in runs}) == 1
    assert runs[0].simulation.clock < runs[1].simulation.clock < runs[2].simulation.clock


def test_a_cache_takes_each_file_once_and_passes_it_on() -> None:
    rng, cached, free, sent = np.random.default_rng(4), dict[str, float](), 0.0, 0
    for now in np.sort(rng.uniform(0, 5, 30)):
        sizes = {str(n): 1000 * (1 + int(n)) for n in rng.choice(9, 3, replace=False)}
        rate, limit = rng.uniform(500, 50_000), 20_000.0
        fresh = sum(size for name, size in sizes.items() if name not in cached)
        expected_free = max(now, free) + fresh / limit if fresh else free
        arrives_at, free = cached_transfer_end(now, free, sizes, rate, limit, cached)
        assert free == pytest.approx(expected_free)
        assert arrives_at >= max(now + sum(sizes.values()) / rate, *(cached[name] for name in sizes)) - 1e-9
        sent += fresh
    assert sent == sum(1000 * (1 + int(n)) for n in cached)


def test_what_no_other_device_downloads_takes_as_long_as_without_a_cache() -> None:
    for rate in (10.0, 1000.0):
        expected = transfer_end(2.0, 3.0, 400, rate, 100.0)
        assert cached_transfer_end(2.0, 3.0, {"a": 100, "b": 300}, rate, 100.0, {}) == pytest.approx(expected)
