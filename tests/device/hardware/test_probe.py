import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import cast

import onnxruntime
import pytest

from fedprune.core.errors import MissingExtraError, RuntimeUnavailableError
from fedprune.planning.latency_model import LatencyTable, typical_table
from fedprune.planning.probe_report import ProbeReport
from fedprune_device.hardware.layer_timing import LayerNets, load_or_measure_table, measure_layers
from fedprune_device.hardware.probe import probe
from fedprune_device.hardware.readings import is_throttled, memory, temperature_c
from fedprune_device.hardware.runtime_process import LineProcess, RuntimeProcess, check_runtime
from support.fakes.cuda_runtime import CudaRuntime

pytestmark = pytest.mark.board

MEMINFO = "MemTotal:        1000000 kB\nMemFree:           10000 kB\nMemAvailable:     400000 kB\n"


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def python(tmp_path: Path, script: str) -> str:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_probe_measures_this_machine() -> None:
    report = probe(seconds=0.1, layer_seconds=2.0)
    assert report.cores == len(os.sched_getaffinity(0))
    assert report.train_rate is not None
    assert report.train_rate > 1e7
    assert report.infer_rate is not None
    assert report.infer_rate > 1e7
    assert report.latency.points >= 2 * len(LayerNets().points), "a point of each net at least, on a busy machine, too"
    assert 0 <= report.latency.error < 1
    assert ProbeReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_probe_says_why_it_measured_the_processor_instead_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = CudaRuntime()
    runtime.fails, runtime.failure = True, "no kernel image is available for execution on the device"
    monkeypatch.setitem(sys.modules, "onnxruntime", cast("ModuleType", runtime))
    report = probe(seconds=0.05, layer_seconds=0, cuda=True)
    assert report.unit == "cpu"
    assert "has no kernels for" in report.cpu_reason
    assert report.train_rate is not None
    assert ProbeReport.from_dict(report.to_dict()) == report
    runtime.fails = False
    assert probe(seconds=0.05, layer_seconds=0, cuda=True).cpu_reason == ""


PEAK = """
from fedprune_device.hardware.readings import peak_memory
from fedprune_device.hardware.runtime_process import LineProcess
from fedprune_device.hardware.probe import probe
from fedprune_device.hardware.runtime_process import RuntimeProcess
before = peak_memory()
assert {0}(seconds=0.05, layer_seconds=0.0).train_rate > 1e6
print(peak_memory() - before)
"""


@pytest.mark.parametrize(("made_by", "keeps_peak"), [("probe", False), ("RuntimeProcess().probe", True)])
def test_a_probe_apart_leaves_this_processs_peak_memory_as_it_is(made_by: str, keeps_peak: bool) -> None:
    done = subprocess.run([sys.executable, "-c", PEAK.format(made_by)], capture_output=True, text=True, check=True)
    assert (float(done.stdout) < 10e6) is keeps_peak


def test_one_interpreter_loads_onnxruntime_checks_models_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    note = f"lambda what: open({str(started)!r}, 'a').write(what + '\\n')"
    (tmp_path / "sitecustomize.py").write_text(
        f"import atexit\nnote = {note}\nnote('begun')\natexit.register(note, 'ended')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with RuntimeProcess() as runtime:
        assert runtime.check() == onnxruntime.__version__
        runtime.check_model()
        assert runtime.probe(seconds=0.05, layer_seconds=0).onnxruntime == onnxruntime.__version__
    assert started.read_text().splitlines() == ["begun", "ended"], "it ends with its standard input"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("kill -ILL $$", "signal 4.*--no-probe|processor lacks"),
        ("""echo 'fedprune: {"error": "no room"}'""", "the probe failed.*no room.*--no-probe"),
        ("yes | head -n 2000", "prints too much"),
    ],
)
def test_a_probe_apart_that_fails_says_why(tmp_path: Path, script: str, says: str) -> None:
    started = """echo 'a line of a library'; echo 'fedprune: {"version": "1"}'; read line; """
    runtime = RuntimeProcess(python(tmp_path, started + script))
    with runtime, pytest.raises(RuntimeUnavailableError, match=says):
        runtime.probe()


def test_a_process_that_hangs_is_killed(tmp_path: Path) -> None:
    with LineProcess([python(tmp_path, "exec sleep 600")]) as process:
        with pytest.raises(EOFError):
            process.read_answer(0.1)
        assert process.timed_out


@pytest.mark.parametrize("seconds", [20.0, 150.0])
def test_a_slow_board_measures_every_net_and_is_done_soon_after_its_time(seconds: float) -> None:
    ticks = itertools.count()
    measurements = measure_layers(seconds=seconds, clock=lambda: float(next(ticks)))
    nets = LayerNets().points
    for training in (True, False):
        assert len({m.architecture.digest for m in measurements if m.training is training}) == len(nets)
    # Beyond its time it measures what has begun, and one width of each net that is left, of eight ticks each.
    assert next(ticks) <= seconds + 8 * (1 + 2 * len(nets))


def test_a_table_is_measured_again_only_where_something_changed(tmp_path: Path) -> None:
    table, asked = typical_table(1e10), list[str]()

    def make() -> LatencyTable:
        asked.append("now")
        return table

    path = tmp_path / "layer_times.json"
    assert load_or_measure_table(path, "board", make) == load_or_measure_table(path, "board", make) == table
    assert len(asked) == 1
    load_or_measure_table(path, "another board", make)
    path.write_text("{}")
    load_or_measure_table(path, "another board", make)
    assert len(asked) == 3
    assert load_or_measure_table(tmp_path / "none" / "x.json", "board", make) == table


def test_memory_is_what_the_kernel_says_within_the_control_groups_limit(tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", MEMINFO)
    assert memory(tmp_path) == (1_024_000_000, 409_600_000)
    put(tmp_path, "sys/fs/cgroup/memory.current", "100000000\n")
    put(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    assert memory(tmp_path) == (1_024_000_000, 409_600_000)
    put(tmp_path, "sys/fs/cgroup/memory.max", "300000000\n")
    assert memory(tmp_path) == (300_000_000, 200_000_000)


def test_the_processors_temperature_wins_over_others(tmp_path: Path) -> None:
    for i, (kind, text) in enumerate([("gpu-thermal", "70000"), ("cpu-thermal", "48312"), ("cpu2", "bad")]):
        put(tmp_path, f"sys/class/thermal/thermal_zone{i}/type", kind)
        put(tmp_path, f"sys/class/thermal/thermal_zone{i}/temp", text)
    assert temperature_c(tmp_path) == 48.312


def test_firmware_or_a_cooler_says_whether_a_board_is_throttled_now(tmp_path: Path) -> None:
    for flags, now in (("0x50005", True), ("50000", False), ("?", False)):
        put(tmp_path, "sys/devices/platform/soc/soc:firmware/get_throttled", flags)
        assert is_throttled(tmp_path) is now
    put(tmp_path, "sys/class/thermal/cooling_device0/type", "cpufreq-cpu0")
    put(tmp_path, "sys/class/thermal/cooling_device0/cur_state", "2")
    assert is_throttled(tmp_path) is True


def test_onnxruntime_that_is_not_installed_names_the_extra(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"\[board\]"):
        check_runtime(python(tmp_path, f"exit {int(MissingExtraError.exit_code)}"))


PEAKS = """
import numpy as np
from fedprune_device.hardware.readings import unreclaimable_memory, peak_memory, reset_peak_memory
from fedprune_device.hardware.probe import process_memory
large = np.ones(50_000_000, np.uint8)
held = unreclaimable_memory()
del large
first = peak_memory()
reset_peak_memory()
second = peak_memory()
np.ones(20_000_000, np.uint8)
print(held, first - second, peak_memory() - second, process_memory(), process_memory())
"""


def test_a_peak_can_begin_again_and_a_process_knows_what_it_takes() -> None:
    run = subprocess.run([sys.executable, "-c", PEAKS], check=True, capture_output=True, text=True)
    peak, fall, rise, first, second = map(float, run.stdout.split())
    assert peak > 50e6
    assert fall > 45e6
    assert 15e6 < rise < 30e6
    assert 30e6 < first < 200e6
    assert abs(second - first) < 5e6


def test_a_missing_interpreter_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match="nothing"):
        check_runtime(str(tmp_path / "nothing"))
