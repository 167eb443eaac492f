"""The files on a boot partition that make an image into a board, for every scheme.

All schemes run `fedprune-install.sh`, which is next to the kit's folder and starts the kit's installer. A power cut may
come at any moment of a first boot, so that the script is started at every boot until the kit is installed.

An image's scheme is recognised by the files on its boot partition:

cloud-init
    Raspberry Pi OS since November 2025, and Ubuntu: `user-data`, `network-config` and `meta-data`, which `ds=nocloud`
    in cmdline.txt asks for (https://www.raspberrypi.com/news/cloud-init-on-raspberry-pi-os/).
firstrun
    Raspberry Pi OS 12, and 13 of 2025-10-01: a script that `systemd.run` in cmdline.txt names
    (https://github.com/raspberrypi/rpi-imager, doc/os_customisation_formats.md).
preseed
    `rpi-preseed.toml`, since August 2026 (https://github.com/raspberrypi/rpi-preseed).
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import PurePosixPath

from fedprune.core.errors import ImageError
from fedprune_flash.image.board_setup import FirstBoot
from fedprune_flash.image.partitions import Fat
from fedprune_flash.on_board.board_system import FIRST_BOOT_UNIT

CMDLINE_FILE = "cmdline.txt"
_ISSUE_FILE = "issue.txt"
_CLOUD_INIT = ("user-data", "meta-data", "network-config")
# How cmdline.txt starts the first boot of Raspberry Pi OS 12 and of earlier ones.
_FIRST_BOOT_WORDS = ("init=/usr/lib/raspberrypi-sys-mods/firstboot", "init=/usr/lib/raspi-config/init_resize.sh")
# The release of Raspberry Pi OS 13 before the first one with cloud-init: no other file shows its scheme.
_LAST_RELEASE_BEFORE_CLOUD_INIT = "Raspberry Pi reference 2025-10-01"

KIT_FOLDER = "fedprune"
STARTER_FILE = "fedprune-install.sh"
# Not `firstrun.sh`: the initramfs of Raspberry Pi OS 12 rewrites a file of that name, and cmdline.txt with it.
SCRIPT_FILE = "fedprune-firstrun.sh"

# The groups of the first user of Raspberry Pi OS.
_GROUPS = "users,adm,dialout,audio,netdev,video,plugdev,games,input,gpio,spi,i2c,render,sudo"

_STARTER = """\
#!/bin/sh
# Installs fedprune from the kit next to this file; logs to /var/log/fedprune-install.log.
cd "$(dirname "$0")/fedprune" && exec python3 -I install.pyz{options} "$@" >>/var/log/fedprune-install.log 2>&1
"""

_FIRSTRUN = """\
#!/bin/sh
# The first boot. A failure here must not keep the board from booting: the parts are independent.
set +e
exec >>/var/log/fedprune-firstrun.log 2>&1
boot=$(cd "$(dirname "$0")" && pwd)
{parts}sh "$boot/fedprune-install.sh" --no-start
sync
# After a power cut no boot would end well whose cmdline.txt is empty, or names a script that is gone.
sed -E 's/ ?systemd\\.(run|run_success_action|unit)=[^ ]*//g' "$boot/cmdline.txt" >"$boot/cmdline.new" &&
    sync && mv "$boot/cmdline.new" "$boot/cmdline.txt" && sync && rm -f "$0"
sync
exit 0
"""

_INSTALLED_UNIT = "/etc/systemd/system/multi-user.target.wants/fedprune.service"

_UNIT = """\
[Unit]
Description=fedprune: install the kit on the boot partition
ConditionPathExists=!{installed}
RequiresMountsFor={mount}
After=cloud-final.service
[Service]
Type=oneshot
ExecStart=/bin/sh {mount}/{starter}
"""

# cloud-init records `runcmd` and `write_files` as done before it does them, once for a board: after a power cut they
# would never run. `bootcmd` runs early at every boot, so that the unit waits for the boot partition and for the end of
# cloud-init. The unit is in /run, where it vanishes with the next boot.
_EVERY_BOOT = """\
[ -e {installed} ] || [ -L {removed} ] && exit 0
mkdir -p {folder}
cat >{unit} <<'FEDPRUNE'
{text}FEDPRUNE
systemctl daemon-reload
systemctl --no-block start {name}
"""

_HOSTNAME = """\
echo {name} >/etc/hostname
sed -i 's/^127\\.0\\.1\\.1.*/127.0.1.1\\t{name}/' /etc/hosts
"""

_USER = """\
first=$(getent passwd 1000 | cut -d: -f1)
if [ -x /usr/lib/userconf-pi/userconf ]; then
    /usr/lib/userconf-pi/userconf {name} '!'
elif [ "$first" != {name} ]; then
    usermod -l {name} "$first" && usermod -m -d /home/{name} {name} && groupmod -n {name} "$first"
fi
home=$(getent passwd {name} | cut -d: -f6)
install -d -o {name} -g {name} -m 700 "$home/.ssh"
printf '%s\\n' {keys} >"$home/.ssh/authorized_keys"
chown {name}:{name} "$home/.ssh/authorized_keys"
chmod 600 "$home/.ssh/authorized_keys"
echo {name} 'ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/010_{name}-nopasswd
chmod 440 /etc/sudoers.d/010_{name}-nopasswd
echo 'PasswordAuthentication no' >/etc/ssh/sshd_config.d/10-fedprune.conf
systemctl enable ssh
"""

_WIFI = """\
umask 077
if systemctl -q is-enabled NetworkManager; then
    cat >/etc/NetworkManager/system-connections/fedprune.nmconnection <<'FEDPRUNE'
[connection]
id=fedprune
type=wifi
[wifi]
mode=infrastructure
ssid={numbers}
hidden={hidden}
[wifi-security]
key-mgmt=wpa-psk
psk={key}
[ipv4]
method=auto
[ipv6]
method=auto
FEDPRUNE
else
    cat >/etc/wpa_supplicant/wpa_supplicant.conf <<'FEDPRUNE'
country={country}
ctrl_interface=DIR=/var/run/wpa_supplicant GROUP=netdev
update_config=1
network={{
    scan_ssid={scan}
    ssid={hex}
    psk={key}
}}
FEDPRUNE
fi
umask 022
raspi-config nonint do_wifi_country {country}
rfkill unblock wifi
for switch in /var/lib/systemd/rfkill/*:wlan; do echo 0 >"$switch"; done
"""


class Scheme(Enum):
    """The mechanism by which an image takes settings at its first boot."""

    CLOUD_INIT = "cloud-init"
    FIRSTRUN = "firstrun"
    PRESEED = "preseed"


def recognise_scheme(fat: Fat, in_root: Callable[[str], bool]) -> Scheme:
    if not fat.exists(CMDLINE_FILE):
        raise ImageError(
            "the boot partition has no cmdline.txt", expected="that of a Raspberry Pi", got="an image for another board"
        )
    words = fat.read(CMDLINE_FILE).decode("utf-8", "replace").split()
    if fat.exists("rpi-preseed.toml") or in_root("/usr/bin/rpi-preseed"):
        return Scheme.PRESEED
    if any(fat.exists(name) for name in _CLOUD_INIT):
        return Scheme.CLOUD_INIT
    if fat.exists("firstrun.sh") or any(word in _FIRST_BOOT_WORDS for word in words):
        return Scheme.FIRSTRUN
    if fat.exists(_ISSUE_FILE) and _LAST_RELEASE_BEFORE_CLOUD_INIT in fat.read(_ISSUE_FILE).decode("utf-8", "replace"):
        return Scheme.FIRSTRUN
    raise ImageError(
        "the boot partition does not show how this image takes settings",
        expected="user-data, rpi-preseed.toml, or the first boot of Raspberry Pi OS in cmdline.txt",
        hint="Take an unchanged image of Raspberry Pi OS, or name its scheme with --scheme.",
    )


def first_boot_files(
    scheme: Scheme, setup: FirstBoot, mount: str, cmdline: str, *, unsigned: bool = False
) -> dict[str, bytes]:
    """Contents by name of all files to write next to the kit, including cmdline.txt where it changes.

    `mount` is where the image mounts its boot partition; an `unsigned` kit is installed without a signature.
    """
    files = {STARTER_FILE: _STARTER.format(options=" --unsigned" if unsigned else "")}
    words = cmdline.split()
    if scheme is Scheme.CLOUD_INIT:
        files |= _cloud_init_files(setup, mount)
        identity = hashlib.sha256("".join(files.values()).encode()).hexdigest()[:16]
        files["meta-data"] = f"dsmode: local\ninstance-id: fedprune-{identity}\n"
        words = [w for w in words if not w.startswith("ds=")] + [f"ds=nocloud;i=fedprune-{identity}"]
    elif scheme is Scheme.PRESEED:
        files["rpi-preseed.toml"] = _preseed_file(setup, mount)
    else:
        files[SCRIPT_FILE] = _FIRSTRUN.format(parts=_firstrun_script(setup))
        words = [w for w in words if not w.startswith(("systemd.run", "systemd.unit="))]
        words += [f"systemd.run={mount}/{SCRIPT_FILE}", "systemd.run_success_action=reboot"]
        words.append("systemd.unit=kernel-command-line.target")
    if scheme is not Scheme.PRESEED:
        files[CMDLINE_FILE] = " ".join(words) + "\n"
    return {name: text.encode() for name, text in files.items()}


def _cloud_init_files(setup: FirstBoot, mount: str) -> dict[str, str]:
    body: dict[str, object] = {"hostname": setup.hostname, "manage_etc_hosts": True}
    commands: list[list[str]] = []
    if setup.user is not None:
        body["users"] = [
            {
                "name": setup.user,
                "groups": _GROUPS,
                "shell": "/bin/bash",
                "lock_passwd": True,  # nosec B105  # a switch, no password
                "sudo": "ALL=(ALL) NOPASSWD:ALL",
                "ssh_authorized_keys": list(setup.ssh_keys),
            }
        ]
        body["ssh_pwauth"] = False
        commands.insert(0, ["systemctl", "enable", "--now", "ssh"])
    if setup.wifi is not None:
        commands.insert(0, ["rfkill", "unblock", "wifi"])
    body["bootcmd"] = [["sh", "-c", _bootcmd(mount)]]
    if commands:
        body["runcmd"] = commands
    files = {"user-data": "#cloud-config\n" + _yaml(body)}
    if setup.wifi is not None:
        point = {"password": setup.wifi.key, **({"hidden": True} if setup.wifi.hidden else {})}
        points = {setup.wifi.ssid: point}
        wireless = {"dhcp4": True, "optional": True, "regulatory-domain": setup.wifi.country, "access-points": points}
        ethernets = {"eth0": {"dhcp4": True, "optional": True}}
        files["network-config"] = _yaml(
            {"network": {"version": 2, "ethernets": ethernets, "wifis": {"wlan0": wireless}}}
        )
    return files


def _bootcmd(mount: str) -> str:
    text = _UNIT.format(installed=_INSTALLED_UNIT, mount=mount, starter=STARTER_FILE)
    unit = PurePosixPath(FIRST_BOOT_UNIT)
    mask = f"/etc/systemd/system/{unit.name}"
    return _EVERY_BOOT.format(
        installed=_INSTALLED_UNIT, removed=mask, folder=unit.parent, unit=unit, name=unit.name, text=text
    )


def _preseed_file(setup: FirstBoot, mount: str) -> str:
    tables: dict[str, dict[str, object]] = {"system": {"hostname": setup.hostname}}
    if setup.user is not None:
        tables["user"] = {"name": setup.user, "passwordless_sudo": True}
        tables["ssh"] = {"enabled": True, "password_authentication": False, "authorized_keys": list(setup.ssh_keys)}  # nosec B105  # a switch, no password
    if setup.wifi is not None:
        tables["wlan"] = {
            "ssid": setup.wifi.ssid,
            "password": setup.wifi.key,
            "password_encrypted": True,  # nosec B105  # a switch, no password
            "hidden": setup.wifi.hidden,
            "country": setup.wifi.country,
            "key_mgmt": "wpa-psk",
        }
    # The installer needs neither network nor time.
    tables["runcmd"] = {"late": [f"sh {mount}/{STARTER_FILE}"], "late_require_time_sync": False}
    text = 'config_version = "1.1"\n'
    # TOML's strings, booleans and lists of strings are those of JSON, without escapes beyond ASCII.
    for name, table in tables.items():
        rows = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in table.items())
        text += f"\n[{name}]\n{rows}"
    return text


def _firstrun_script(setup: FirstBoot) -> str:
    script = _HOSTNAME.format(name=setup.hostname)
    if setup.user is not None:
        script += _USER.format(name=setup.user, keys=" ".join(shlex.quote(k) for k in setup.ssh_keys))
    if setup.wifi is not None:
        wifi, raw = setup.wifi, setup.wifi.ssid.encode()
        script += _WIFI.format(
            # As numbers, so that no character of the name can break out of the file.
            numbers="".join(f"{byte};" for byte in raw),
            hex=raw.hex(),
            key=wifi.key,
            country=wifi.country,
            hidden=str(wifi.hidden).lower(),
            scan=int(wifi.hidden),
        )
    return script


def _yaml(value: Mapping[str, object]) -> str:
    """Write YAML: JSON is a part of it, unless characters beyond ASCII are escaped as surrogate pairs."""
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"
