"""Memory of a board of 512 MB: `python -m benchmarks.small_board`.

A real server, Mosquitto and one `fedprune-device run` with the profile of a Raspberry Pi Zero 2 W, in a control group
with what that board leaves to programs (needs root and the memory controller of cgroup v1; without them the limit is
compared, not enforced).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.harness import peak_bytes, run_cases

BOARD = "raspberry-pi-zero-2w"
NETS = {"lenet": (1, 28, 28), "mobilenetv2_100": (3, 96, 96)}
"""The second is timm's."""
BATCH = 8
SAMPLES = 64
ROUNDS = 3
IDLE_S = 8.0
GROUP = Path("/sys/fs/cgroup/memory/fedprune-small-board")

FLEET = """\
[job]
name = "small"
rounds = {rounds}
devices = 1
strategy = "plain"
scorer = "ordered"
deadline_s = 3600

[job.recipe]
epochs = 1
batch_size = {batch}
lr = 0.01
evaluate_every = {rounds}

[model]
path = "model.onnx"

[evaluation]
data = "samples.npz"

[server]
broker = "mqtt://127.0.0.1:{port}"
state = "state"
"""


@contextmanager
def control_group(limit: int) -> Iterator[list[str]]:
    """The prefix of a command that runs within so much memory; empty without cgroup v1."""
    try:
        prefix = ["/bin/sh", "-c", f'echo $$ > {GROUP}/cgroup.procs && exec "$@"', "sh"]
        try:
            GROUP.mkdir(exist_ok=True)
            (GROUP / "memory.limit_in_bytes").write_text(str(limit))
        except OSError as error:
            print(f"no control group ({error})", file=sys.stderr)
            prefix = []
        yield prefix
    finally:
        with suppress(OSError):
            GROUP.rmdir()


def memory(pid: int) -> tuple[int, int]:
    """Bytes of a process and those below it, shared pages in parts, and how many of them have loaded onnxruntime."""
    from benchmarks.swarm.site import family

    total = loaded = 0
    for each in family(pid):
        total += peak_bytes(each, "Pss", "smaps_rollup")
        loaded += "onnxruntime_pybind11_state" in Path(f"/proc/{each}/maps").read_text()
    return total, loaded


def job_on_board(net: str, shape: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """One job on one board, and the board afterwards."""
    from benchmarks.planner import module_of
    from benchmarks.swarm.site import site
    from fedprune.planning.profile_store import find_profile
    from fedprune_export.importing import export_torch

    module = module_of("LeNet" if net == "lenet" else net, shape[-1])
    (folder / "model.onnx").write_bytes(export_torch(module, input_shape=shape))
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((SAMPLES, *shape)).astype(np.float32), rng.integers(0, 10, SAMPLES)
    np.savez(folder / "samples.npz", x=x, y=y)
    profile = find_profile(BOARD)
    limit = profile.memory.total_bytes - profile.memory.reserve_bytes
    with site(folder) as place, control_group(limit) as within:
        config = folder / "fleet.toml"
        config.write_text(FLEET.format(rounds=ROUNDS, batch=BATCH, port=place.port))
        place.broker()
        board = place.board("zero", BOARD, folder / "samples.npz", within=within)
        place.wait_for("zero", lambda: "connected" in place.log_text("zero"), "the board isn't connected")
        time.sleep(IDLE_S)
        before, _ = memory(board.pid)
        place.server(config, "--verbose")  # with every limit of the plan
        loaded = 0
        while "is finished" not in place.log_text("server"):
            if board.poll() is not None:
                raise SystemExit(f"{net}: the board's agent ended: {place.log_text('zero')[-3000:]}")
            loaded = max(loaded, memory(board.pid)[1])
            time.sleep(0.1)
        time.sleep(IDLE_S)
        after, _ = memory(board.pid)
        place.look()
        peak = place.watched["zero"].peak
        failed = int((GROUP / "memory.failcnt").read_text()) if within else None
        log = place.log_text("server").splitlines()
        plan = [line for line in log if "memory:" in line or "weights: " in line]
        place.stop("zero")
    return {
        "shape": shape, "limit_bytes": limit, "training_bytes": profile.training_memory_bytes,
        "idle_before_bytes": before, "idle_after_bytes": after, "peak_bytes": peak, "loaded": loaded,
        "reclaimed": failed, "plan": [" ".join(line.split()[1:]) for line in plan],
    }  # fmt: skip


def measure(net: str) -> dict[str, Any]:
    with TemporaryDirectory(prefix="fedprune-small-") as scratch:
        return job_on_board(net, NETS[net], Path(scratch))


if __name__ == "__main__":
    run_cases("small_board", __doc__, [{"net": net} for net in NETS], measure, "onnxruntime")
