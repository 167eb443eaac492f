"""Boards that SSH reaches: sshd on ports of this machine, each with a file system of its own below a folder.

They run as whoever runs the tests and let nobody else in. What a board's systemctl does is written into a script.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.processes.machine import free_port, listens

SYSTEMCTL = """\
#!/bin/sh
# What this board's systemd would do; `broken` makes the service end whenever it is started.
run="$(dirname "$0")/../../run"
mkdir -p "$run"
echo "$*" >>"$run/calls"
case "$1" in
start | restart) touch "$run/up" ;;
stop) [ ! -e "$run/stubborn" ] || exit 1; rm -f "$run/up" ;;
show)
    if [ -e "$run/broken" ]; then echo ActiveState=activating; echo SubState=auto-restart; echo ConditionResult=yes
    elif [ -e "$run/unmet" ]; then echo ActiveState=inactive; echo SubState=dead; echo ConditionResult=no
    elif [ -e "$run/up" ]; then echo ActiveState=active; echo SubState=running; echo ConditionResult=yes
    else echo ActiveState=inactive; echo SubState=dead; echo ConditionResult=yes
    fi ;;
esac
exit 0
"""

_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {host_key}
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PidFile none
LogLevel ERROR
SetEnv PATH={path} PYTHONPATH={folder}/python
Subsystem sftp internal-sftp
"""


def sshd() -> str:
    """The program, by its full name, which it insists on."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if program is None or shutil.which("ssh") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have sshd and ssh")
        pytest.skip("sshd (openssh-server) is not installed")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where Debian's sshd gives up its rights
    return program


@dataclass
class Board:
    """A board: its name, its port, and where its file system begins."""

    name: str
    port: int
    root: Path
    process: subprocess.Popen[bytes]

    def calls(self) -> list[str]:
        """What its systemctl was told to do."""
        path = self.root / "run/calls"
        return [c for c in path.read_text().splitlines() if not c.startswith("show")] if path.exists() else []

    @property
    def claim(self) -> Path:
        return self.root / "var/lib/fedprune/claim"


class Boards:
    """Some boards, and what is needed to reach them."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        program = sshd()
        for name in ("host", "user"):
            key = str(folder / name)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", key], check=True)
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        self.boards = [self._start(program, name, path) for name in names]
        key_text = " ".join((folder / "host.pub").read_text().split()[:2])
        lines = [f"[127.0.0.1]:{board.port} {key_text}\n" for board in self.boards]
        (folder / "known_hosts").write_text("".join(lines))
        for board in self.boards:
            deadline = time.monotonic() + 30
            while not listens(board.port):
                assert time.monotonic() < deadline, "sshd doesn't answer"
                time.sleep(0.05)

    def _start(self, program: str, name: str, path: str) -> Board:
        root = self.folder / "roots" / name
        (root / "usr/bin").mkdir(parents=True)
        (root / "usr/bin/systemctl").write_text(SYSTEMCTL)
        (root / "usr/bin/systemctl").chmod(0o755)
        port = free_port()
        config = self.folder / f"{name}.conf"
        config.write_text(_CONFIG.format(port=port, host_key=self.folder / "host", folder=self.folder, path=path))
        process = subprocess.Popen([program, "-D", "-e", "-f", str(config)], stderr=subprocess.DEVNULL)
        return Board(name, port, root, process)

    def inventory(self, **variables: object) -> Path:
        """An inventory of them all for Ansible, with further variables of all boards."""
        login = {
            "ansible_host": "127.0.0.1",
            "ansible_ssh_private_key_file": str(self.folder / "user"),
            "ansible_ssh_extra_args": f"-o UserKnownHostsFile={self.folder / 'known_hosts'} -o IdentitiesOnly=yes",
            "ansible_become": False,
            "ansible_python_interpreter": sys.executable,
        }
        hosts = {
            board.name: {
                "ansible_port": board.port,
                "ansible_remote_tmp": str(board.root / "tmp"),
                "fedprune_root": str(board.root),
            }
            for board in self.boards
        }
        out = self.folder / "boards.json"
        out.write_text(json.dumps({"boards": {"hosts": hosts, "vars": {**login, **variables}}}))
        return out

    def stop(self) -> None:
        """End them."""
        for board in self.boards:
            board.process.terminate()
        for board in self.boards:
            board.process.wait(timeout=20)
