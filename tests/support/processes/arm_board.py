"""A board without the board: an arm64 userland whose programs qemu-user runs under proot, with a processor of choice.

Neither root nor binfmt is needed: proot follows every process and starts the emulator for each program.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.processes.arm_userland import tool

_CPU_PARTS = {"cortex-a53": "0xd03", "cortex-a72": "0xd08", "cortex-a76": "0xd0b", "cortex-a78": "0xd41"}
"""What a processor's `CPU part` says in /proc/cpuinfo."""

_STAND_INS = {"cortex-a78": "cortex-a76"}
"""Whose instructions are emulated for processors that qemu 7.2 doesn't have."""

_CORES = 4
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Board:
    """A userland of its own, whose file system programs change, and what it runs on.

    The processor is named as qemu does; the plugin is one of TCG that watches what programs execute.
    """

    root: Path
    processor: str = "cortex-a72"
    environment: Mapping[str, str] = field(default_factory=dict)
    plugin: Path | None = None

    def __post_init__(self) -> None:
        self._look_like_a_board()

    def command(self, *words: str | Path, offline: bool = False) -> list[str]:
        """What starts a program of the board here; `offline` is in a network of its own, where there is nobody."""
        emulator = tool("qemu-aarch64-static", "qemu-user-static")
        if self.plugin is not None:  # the static emulator loads none; proot has this machine's files there
            emulator = f"{tool('qemu-aarch64', 'qemu-user')} -plugin /host-rootfs{self.plugin}"
        emulator += f" -cpu {_STAND_INS.get(self.processor, self.processor)}"
        command = [tool("proot", "proot"), "-0", "-q", emulator, "-r", str(self.root), "-w", "/"]
        hardware = self._hardware
        # onnxruntime reads both and crashes where a board's processor has the cores of a PC.
        binds = (
            "/proc",
            "/dev",
            "/sys",
            f"{hardware}/cpu:/sys/devices/system/cpu",
            f"{hardware}/cpuinfo:/proc/cpuinfo",
        )
        command += [word for bind in binds for word in ("-b", bind)]
        alone = [tool("unshare", "util-linux"), "--net", *(() if os.geteuid() == 0 else ("--map-root-user",))]
        return [*(alone if offline else ()), *command, *map(str, words)]

    def run(self, *words: str | Path, offline: bool = False, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, whatever that is."""
        command = self.command(*words, offline=offline)
        with subprocess.Popen(
            command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)  # proot's end alone would leave what it follows
                raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    @contextmanager
    def running(self, words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """A program of the board, which ends with the block at the latest; what it says is added to a file."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.command(*words), env=self._environment, stdout=file, stderr=file, start_new_session=True
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def _environment(self) -> dict[str, str]:
        return {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", **self.environment}

    @property
    def _hardware(self) -> Path:
        return self.root.with_name(f"{self.root.name}.{self.processor}")

    def _look_like_a_board(self) -> None:
        """What the kernel of such a board would say of its processor."""
        cores = self._hardware / "cpu"
        cores.mkdir(parents=True, exist_ok=True)
        for name in ("online", "possible", "present"):
            (cores / name).write_text(f"0-{_CORES - 1}\n")
        rows = (
            f"processor\t: {core}\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"
            "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\n"
            f"CPU part\t: {_CPU_PARTS[self.processor]}\nCPU revision\t: 3\n\n"
            for core in range(_CORES)
        )
        (self._hardware / "cpuinfo").write_text("".join(rows))


def copy_userland(userland: Path, place: Path, **changes: str) -> Board:
    """A board of its own with a userland's files."""
    shutil.copytree(userland, place, symlinks=True)
    return Board(place, **changes)
