"""The installer as root on a system of its own: /etc, /opt and /var/lib are mounted anew, and systemctl is a script."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedprune_flash import BoardSettings, BoardTarget, build_kit
from fedprune_flash.kit.target import PYTHONS
from support.fakes import tiny_wheels
from support.fakes.runtime_releases import CLAIM, KEY
from support.processes.ssh_boards import SYSTEMCTL

pytestmark = pytest.mark.system

SCRIPT = """\
set -e
mount --bind "$WORK/etc" /etc
for folder in /opt /var/lib /var/log /var/mail; do mount -t tmpfs tmpfs $folder; done
[ -e /etc/of-the-test ] && mountpoint -q /opt && mountpoint -q /var/lib
echo "== mounted"
PATH="$WORK/usr/bin:$PATH"
install() { /usr/bin/python3 -I "$WORK/kit/install.pyz" "$@"; }
show() { find /opt/fedprune/* /var/lib/fedprune -printf '%u %m %p\\n'; }
install --wait 20
show
echo "== again"
install --wait 20
echo "== taken by root"
chown root /opt/fedprune/state /opt/fedprune/state/state.json
mkdir -p /var/lib/fedprune/deep
cp /etc/hostname /var/lib/fedprune/deep/file
ln -s /etc/passwd /var/lib/fedprune/deep/link
install
show
echo "== at rest"
install
stat -c %U /etc/passwd
find /var/lib/fedprune/deep -printf '%u\\n'
echo "== as its user"
setpriv --reuid=fedprune --regid=fedprune --clear-groups /usr/bin/python3 -I /opt/fedprune/launcher.pyz hello
setpriv --reuid=fedprune --regid=fedprune --clear-groups cat /var/lib/fedprune/claim
echo
echo "== removed"
install --remove
ls /opt /var/lib
id -un fedprune
echo "== purged"
install --remove --purge
ls /opt /var/lib
id -un fedprune 2>/dev/null || echo nobody
"""


def test_slots_and_state_are_the_services_users_and_the_launcher_is_roots(tmp_path: Path, wheels: Path) -> None:
    tools = ("unshare", "mount", "useradd", "userdel", "setpriv")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if os.geteuid() != 0 or any(shutil.which(t, path=path) is None for t in tools):
        pytest.skip("no system can be mounted here: that takes root, and the programs of util-linux and passwd")
    version = ("/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    python = subprocess.run(version, capture_output=True, text=True, check=False).stdout.strip()
    if python not in PYTHONS or Path("/etc/nv_tegra_release").exists():
        pytest.skip("no system that kits are for can be mounted here")
    board = BoardSettings("mqtts://broker.example:8883", "attic", "lab", "own.samples:load")
    links = shutil.copytree(wheels, tmp_path / "links")
    (links / "onnxruntime-1.31-py3-none-any.whl").unlink()
    refuses = "import os\nif os.geteuid() == 0:\n    raise RuntimeError('loaded as root')\n"
    tiny_wheels.wheel(links, "onnxruntime", "1.31", {"onnxruntime/__init__.py": refuses})
    fedprune_wheel = next(links.glob("fedprune-*"))
    target = BoardTarget(python, platform.machine())
    build_kit(tmp_path / "kit", board, target, wheel=fedprune_wheel, links=[links], claim=CLAIM, signer=KEY)
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/systemctl").write_text(SYSTEMCTL)
    (tmp_path / "usr/bin/systemctl").chmod(0o755)
    subprocess.run(["cp", "-a", "/etc", str(tmp_path / "etc")], check=True)
    (tmp_path / "etc/of-the-test").touch()
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", SCRIPT],
        env={"PATH": path, "WORK": str(tmp_path), "LC_ALL": "C"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "== mounted" not in done.stdout:
        pytest.skip("no system can be mounted here")
    assert done.returncode == 0, done.stdout + done.stderr
    sections = ("== installed\n" + done.stdout.partition("== mounted\n")[2]).split("== ")[1:]
    first_rows, second_rows, upgrade_rows, rest, user, removed, purged = (s.splitlines()[1:] for s in sections)
    for rows in (first_rows, upgrade_rows):
        entries = [row.split() for row in rows if re.fullmatch(r"\w+ \d+ /\S+", row)]
        owners = {name: [user, mode] for user, mode, name in entries}
        assert owners.pop("/opt/fedprune/launcher.pyz") == ["root", "644"]
        assert owners.pop("/opt/fedprune/server.pub") == ["root", "644"]
        assert owners.pop("/var/lib/fedprune/claim") == ["fedprune", "400"]
        assert len(owners) >= 9
        assert {owner for owner, _ in owners.values()} == {"fedprune"}
    assert "running: fedprune.service" in first_rows
    assert not [row for row in second_rows if row.startswith("now:")]
    assert [row for row in upgrade_rows if row.startswith("now:")] == [
        "now: give slots and /var/lib/fedprune to fedprune",
        "now: start fedprune.service",
    ]
    assert not [row for row in rest if row.startswith("now:")]
    assert rest[-4:] == ["root", *["fedprune"] * 3]
    assert user == ["fedprune hello", CLAIM]
    assert "fedprune" in removed  # its user, and the state
    assert "now: delete /opt/fedprune" in removed
    assert purged[-1] == "nobody"
    assert "fedprune" not in purged
