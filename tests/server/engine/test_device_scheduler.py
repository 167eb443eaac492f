"""Devices are lent by what changes, and to the same effect as by a walk over all of them."""

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedprune.wire.messages import Offer
from fedprune_server.engine.device_scheduler import DeviceScheduler
from support.fakes.several_jobs import SeveralJobs, rename_job
from support.fakes.tiny_job import JOB

ASYNCHRONOUS = {
    "strategy": "support.fakes.tiny_job:scheduled",
    "options": {"schedule": {"kind": "asynchronous", "arrivals": 2}},
}
JOBS = st.lists(
    st.sampled_from([{}, {"devices": 1}, {"devices": 2}, {"devices": 5}, ASYNCHRONOUS]), min_size=2, max_size=3
)


def compare(loans: DeviceScheduler) -> None:
    """See that what is kept of devices is what a walk over all of them finds."""
    runners, here = loans._runners, loans._connected
    for job in runners:
        assert loans._suitable_devices[job] == {d for d in here if loans._suits(job, d)}
    assert loans._free_devices == {
        d
        for d in here
        if d not in loans.job_of_device and not any(k.demand.awaits_part_of(d) for k in runners.values())
    }
    assert loans._working_devices == {
        d: j for d, j in loans.job_of_device.items() if runners[j].demand.awaits_part_of(d)
    }


@given(JOBS, st.lists(st.tuples(st.integers(1, 25), st.booleans()), max_size=5), st.booleans())
@example([{"devices": 2}, {"devices": 2}], [(3, True), (5, False)], True)
@settings(max_examples=4, deadline=None)
def test_what_is_kept_is_what_a_walk_over_all_devices_finds(
    kinds: list[dict[str, Any]], ends: list[tuple[int, bool]], strange: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        jobs = [rename_job(JOB, f"job-{i}", **{"rounds": 2, "deadline_s": 50, **kind}) for i, kind in enumerate(kinds)]
        several, compared, offers = SeveralJobs(Path(folder), jobs, "abcd"), [0], [0]
        several.air.devices["d"].profile = "unknown-board" if strange else several.air.devices["d"].profile
        host = several.host()
        scheduler: Any = host._scheduler
        share = scheduler.share_devices

        def share_and_compare(now: float, *, finished: bool) -> None:
            share(now, finished=finished)
            if not finished:
                compare(scheduler)
            compared[0] += 1

        scheduler.share_devices = share_and_compare
        for device in several.air.devices.values():

            def dying(offer: Offer, device: Any = device, take: Any = device.take) -> None:
                """At some offers a device loses its connection, with its part or without."""
                offers[0] += 1
                keeps = dict(ends).get(offers[0])
                if keeps is not False:
                    take(offer)
                if keeps is not None:
                    device.die()
                    device.session += 1
                    device.send_birth()

            device.take = dying  # type: ignore[method-assign]

        def idle() -> None:
            if not host.is_busy:
                several.air.now += 0.5
                if several.air.now > 150:  # a job that needs more devices than there are never ends
                    host.stop()

        several.air.on_idle = idle
        host.run(until_finished=True)
        assert compared[0]
