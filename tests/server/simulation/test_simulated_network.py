"""Links, boards and windows of time: keyed, as the formulas say, and in simulated fleets."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.blobs.blob_ref import BlobRef
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.cost_prediction import predict_costs
from fedprune.planning.profile_store import find_profile, profile_names
from fedprune.planning.width_plan import TIME_MARGIN, WidthPlan
from fedprune.strategies import compose
from fedprune_server.simulation.fleet.device_runner import DeviceRunner
from fedprune_server.simulation.fleet.device_table import with_link
from fedprune_server.simulation.fleet.virtual_device import Outcome, StoredData
from fedprune_server.simulation.network_model import Availability, Weather, transfer_end
from support.fakes.digits_simulation import boards, digits_net, digits_simulation, noting

DEVICES = [f"d{i}" for i in range(400)]


@pytest.mark.parametrize("draws", [1, 20])
def test_factors_are_means_of_log_normal_draws(draws):
    sigma = 0.3
    weather = Weather(links_sigma=sigma, draws=draws)
    factors = np.array([weather.link_factor(7, r, d, w) for r in (1, 2, 3) for d in DEVICES for w in ("down", "up")])
    mean, deviation = math.exp(sigma**2 / 2), math.sqrt((math.exp(sigma**2) - 1) * math.exp(sigma**2) / draws)
    assert factors.mean() == pytest.approx(mean, abs=4 * deviation / math.sqrt(len(factors)))
    assert factors.std() == pytest.approx(deviation, rel=0.1)


def test_a_factor_is_keyed_by_seed_round_device_and_way():
    weather = Weather(links_sigma=0.3, compute_sigma=0.3)
    factor = weather.link_factor(1, 2, "d", "up")
    assert weather.link_factor(1, 2, "d", "up") == factor
    factors_elsewhere = [
        weather.link_factor(2, 2, "d", "up"),
        weather.link_factor(1, 3, "d", "up"),
        weather.link_factor(1, 2, "e", "up"),
    ]
    assert (
        len({factor, *factors_elsewhere, weather.link_factor(1, 2, "d", "down"), weather.compute_factor(1, 2, "d")})
        == 6
    )


@given(
    period=st.floats(1, 1e6),
    shares=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)),
    at=st.floats(0, 1e7),
    device=st.sampled_from(DEVICES),
)
def test_windows_come_once_a_period_and_last_a_device_s_share(period, shares, at, device):
    availability = Availability(period, min(shares), max(shares))
    begin, end = availability.next_window(5, device, at)
    assert end > at
    assert begin <= at or begin - at <= period
    assert min(shares) * period * 0.999 <= end - begin <= max(shares) * period * 1.001
    assert availability.next_window(5, device, end)[0] == pytest.approx(begin + period, rel=1e-9)
    assert availability.next_window(5, device, max(at, begin)) == (begin, end)


def test_devices_have_their_own_place_and_share():
    windows = [Availability(100, 0.2, 0.8).next_window(0, d, 1e6) for d in DEVICES]
    assert len({b % 100 for b, _ in windows}) == len(DEVICES)
    shares = np.array([e - b for b, e in windows]) / 100
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert np.mean([b <= 1e6 for b, _ in windows]) == pytest.approx(0.5, abs=0.1)


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 10**7), st.floats(1e3, 1e9)), min_size=1, max_size=20),
    st.floats(1e3, 1e9),
)
def test_a_server_s_link_carries_no_more_than_it_can(transfers, limit):
    now = free = 0.0
    sent = idle = 0.0
    for wait, size, rate in transfers:
        now += wait
        begin = max(now, free)
        idle += begin - free
        arrived, free = transfer_end(now, free, size, rate, limit)
        sent += size
        assert arrived >= free * (1 - 1e-12)  # nothing is there before the server has sent it
        assert arrived >= now + size / min(rate, limit) * (1 - 1e-12)
    assert free == pytest.approx(idle + sent / limit)


# In simulated fleets.

SMALL = {"density": 0.25, "recipe": Recipe(max_steps=1), "scorer": "ordered"}


@pytest.fixture
def build(tmp_path):
    return lambda folder="run", **settings: digits_simulation(tmp_path / folder, **{**SMALL, **settings})


def on_link(device, **link):
    return replace(device, profile=with_link(device.profile, link))


def test_weather_changes_times_and_not_the_model(build):
    calm, stormy = build("calm"), build("stormy", weather=Weather(0.5, 0.5, 0.2, 0.2, 3))
    calm.run(), stormy.run()
    assert [r["model"] for r in calm.state.history] == [r["model"] for r in stormy.state.history]
    assert stormy.clock != calm.clock
    assert build("again", weather=Weather(0.5, 0.5, 0.2, 0.2, 3)).run() == stormy.state.history


def test_the_virtual_clock_follows_the_weather(build):
    """One device: a round takes what the arithmetic of its profile and the round's factors says."""
    zero, weather = boards()[0], Weather(links_sigma=0.3, compute_sigma=0.3, draws=20)
    simulation = build(fleet=[zero], rounds=1, weather=weather)
    (row,) = simulation.run()
    link, sent = zero.profile.link, simulation.record().last
    widths = tuple(row["devices"][zero.name]["widths"])
    predicted = zero.predict(simulation.model.architecture, widths, simulation.job.recipe)
    down, up = (weather.link_factor(3, 1, zero.name, direction) for direction in ("down", "up"))
    expected = sent.down / (link.down_bytes_s * down) + sent.up / (link.up_bytes_s * up) + 4 * link.latency_s
    speed = weather.compute_factor(3, 1, zero.name)
    assert simulation.clock == pytest.approx(expected + predicted.computing_s / speed)
    assert sent.joules == pytest.approx(predicted.train_j / speed, rel=1e-3), "a slow board takes its power for longer"


def test_a_device_s_own_link_takes_the_profile_s_place(build):
    simulation = build(fleet=[on_link(d, up_mb_s=0.001) for d in boards()], rounds=1)
    simulation.run()
    assert simulation.clock > simulation.record().last.up / 3 / 1000


def test_devices_train_in_their_windows_only(build):
    availability, trainings = Availability(40.0, 0.3, 0.6), []
    far = [
        noting(on_link(d, latency_s=4), lambda name, _: trainings.append((name, simulation.clock))) for d in boards()
    ]
    simulation = build(fleet=far, rounds=6, devices=1, deadline_s=90.0, availability=availability)
    assert len(simulation.run()) == 6
    for name, trained_at in trainings:
        begin, end = availability.next_window(3, name, trained_at)
        assert begin <= trained_at < end
    assert simulation.clock > 40
    online = {name: device.online for name, device in simulation.state.devices.items()}
    begins = {name: availability.next_window(3, name, simulation.clock)[0] for name in online}
    assert online == {name: begin <= simulation.clock for name, begin in begins.items()}
    assert set(online.values()) == {True, False}


def test_an_update_that_a_window_cut_off_is_sent_when_the_device_is_back(build):
    trained = []
    device = on_link(boards()[2], down_mb_s=1e3, up_mb_s=1e3, latency_s=0)
    device = noting(device, lambda name, _: trained.append(name))
    quick = build("quick", fleet=[device], rounds=1)
    quick.run()
    size = quick.record().last.up
    begin, end = Availability(100.0, 0.5, 0.5).next_window(3, device.name, 0.0)
    opens = max(0.0, begin)
    slow = on_link(device, up_mb_s=size / 1e6 / ((end - opens) * 0.9))  # the upload takes most of a window
    late = build("late", fleet=[slow], rounds=3, deadline_s=1e5, availability=Availability(100.0, 0.5, 0.5))
    assert [h["devices"][device.name]["progress"] for h in late.run()] == ["folded"] * 3
    assert len(trained) == 1 + 3  # never again only because an upload was cut off
    assert late.record().last.up > 3 * size  # what was cut off was sent twice


def test_what_is_planned_by_time_is_in_time_on_every_board_and_slow_links_too(tmp_path, monkeypatch):
    """Every board has as many samples as make the whole model too slow, and sends back what it was sent."""

    def send_back(_, device, offer, number):
        return Outcome(BlobRef.from_dict(offer["weights"]), device.samples, 1, {})

    monkeypatch.setattr(DeviceRunner, "train", send_back)
    settings = {"strategy": "fedprune", "deadline_s": 20.0, "rounds": 2, "compression": "none"}
    settings["compression_down"] = "int8"
    job, net, fleet = Job(**settings), digits_net().architecture, []
    recipe = compose(job).planned_recipe(job, "", net.sizes, 1.0, 64)
    for name in profile_names():
        for link in ({}, {"down_mb_s": 0.03, "up_mb_s": 0.03, "latency_s": 0.2}):
            profile, samples = with_link(find_profile(name), link), 64
            costs = partial(predict_costs, net, net.sizes, profile, recipe, codecs=(None, "int8"))
            while TIME_MARGIN * costs(samples).round_s <= job.deadline_s:
                samples = math.ceil(1.01 * samples)
            fleet.append(replace(boards()[0], name=f"{name}-{len(link)}", profile=profile))
            fleet[-1] = replace(fleet[-1], data=StoredData(samples, fleet[-1].name, fleet[-1].load))
    simulation = digits_simulation(tmp_path, fleet=fleet, **settings)
    history = simulation.run()
    assert {WidthPlan.from_dict(device.plan).bound for device in simulation.state.devices.values()} == {"time"}
    parts = [(row["round"], name, part["kind"]) for row in history for name, part in row["devices"].items()]
    assert len(parts) == 2 * len(fleet)
    assert [part for part in parts if part[2]] == []
